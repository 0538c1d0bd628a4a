"""IsoFLOP studies: from a recipe to curves, optima, tables and plots, and what its models cost to run."""
