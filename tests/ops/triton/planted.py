"""Kernels that are wrong on purpose: each has what the ahead-of-time tests must find."""

import triton
import triton.language as tl


@triton.jit
def adds(x, y, BLOCK: tl.constexpr):
    """Adds floats in whatever order programs come."""
    at = tl.arange(0, BLOCK)
    tl.atomic_add(y + at, tl.load(x + at))


@triton.jit
def narrow(x, y, BLOCK: tl.constexpr):
    """Reads every other number of a row."""
    at = tl.arange(0, BLOCK)
    tl.store(y + 2 * at, tl.load(x + 2 * at))


@triton.jit
def spills(x, y, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Keeps far more numbers than a warp has registers."""
    at = tl.arange(0, BLOCK)
    total = tl.load(x + at)
    for step in range(STEPS):
        total = total * total + tl.load(x + step * BLOCK + at)
    tl.store(y + at, total)
