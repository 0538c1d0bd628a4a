"""How small recipes of studies begin."""

DATA = """
run = "{folder}/out"
[data]
folder = "{folder}/tokens"
vocab_size = 300
context = 16
batch_size = 4
"""
"""Tokens and output below the folder `folder`."""
