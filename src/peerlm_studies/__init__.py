"""Studies: many runs, their rows, and the tables and plots made from them."""
