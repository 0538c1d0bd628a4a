"""Equal seconds: every method trained for as many steps as fit into the same seconds, at a speed measured before."""
