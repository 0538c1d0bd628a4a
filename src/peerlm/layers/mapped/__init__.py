"""Tables whose rows are in mapped files, larger than memory if need be, with a log that takes changes back."""
