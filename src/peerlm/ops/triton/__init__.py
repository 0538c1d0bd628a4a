"""Triton kernels for GPUs, behind the operators of `ops/operators.py`."""
