"""How large what the kernels take may be."""

from torch import Tensor

MOST_SUB_KEYS = 8192
"""Per half: the scores of all of them must fit the registers of one program, and ids must fit 32 bits."""


def too_many_sub_keys(sub_keys_2HnC: Tensor) -> str:
    """Why there are too many sub-keys for the kernels; empty where there are not."""
    n = sub_keys_2HnC.shape[2]
    if n <= MOST_SUB_KEYS:
        return ""
    return f"there are {n} sub-keys per half, and the Triton kernels take up to {MOST_SUB_KEYS}"
