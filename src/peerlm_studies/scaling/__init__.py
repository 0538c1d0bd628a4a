"""Scaling laws: fitted to rows of runs, with their uncertainty, and used to plan a run."""
