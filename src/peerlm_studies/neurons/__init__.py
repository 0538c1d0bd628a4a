"""Retrieved neurons of a dense model: how few suffice, and what finetuning them reaches."""
