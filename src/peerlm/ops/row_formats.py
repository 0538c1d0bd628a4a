"""Which dtypes rows have that are stored with scales."""

import torch

SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn)
"""Eight bits a number; each vector of a row has a scale in float32, by which it is multiplied."""
