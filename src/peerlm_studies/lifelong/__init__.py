"""Lifelong learning: a model learns domain after domain, and what it forgets meanwhile."""
