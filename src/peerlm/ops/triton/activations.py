"""Activations of neurons and their slopes, in float32.

The approximations are those of the CPU's kernels (`csrc/vec.h`): Triton's own exponential loses digits where its
argument is large, and 1 + erf(z) cancels where z is negative.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x to a relative 1e-7, for x in -87 .. 88; clamped above, 0 below, NaN stays NaN."""
    vanishes = x < -87.0
    clamped = tl.where(x > 88.0, 88.0, tl.where(vanishes, -87.0, x))
    shifted = clamped * 1.44269504 + 12582912.0  # 1.5 * 2^23: rounds to a whole number in the low bits
    n = shifted - 12582912.0
    r = (clamped - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts
    # least squares on |r| <= ln 2 / 2
    p = 1.395060015e-3 * r + 8.368953725e-3
    p = p * r + 4.166620417e-2
    p = p * r + 1.666651830e-1
    p = p * r + 0.5
    p = p * r * r + r + 1.0
    power = (shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)
    return tl.where(vanishes, 0.0, p * power.to(tl.float32, bitcast=True))


@triton.jit
def _gelu(z):
    # Phi(-t) = exp(-t^2 / 2) * (polynomial in 1 / (1 + 0.3 t)) for t >= 0, relative error 6e-8 up to t = 14
    t = tl.abs(z)
    bell = exp(t * t * -0.5)
    u = 1.0 / (1.0 + 0.3 * t)
    p = 0.038378410 * u - 0.169166669
    p = p * u + 0.228661165
    p = p * u - 0.0765076354
    p = p * u + 0.142536268
    p = p * u + 0.0946832374
    p = p * u + 0.121920407
    p = p * u + 0.119487680
    p = p * u + 7.16930076e-6
    tail = bell * p
    phi = tl.where(z < 0.0, tail, 1.0 - tail)
    return z * phi, phi + z * bell * 0.398942280


@triton.jit
def _gelu_tanh(z):
    # z sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3)), as GPT-2 and Gemma have it
    square = z * z
    odds = exp(z * (square * -0.0713548163 - 1.59576912))
    sigmoid = 1.0 / (1.0 + odds)
    rise = square * 0.214064449 + 1.59576912
    return z * sigmoid, sigmoid * (1.0 + z * (odds * sigmoid) * rise)  # 1 - sigmoid would cancel


@triton.jit
def _silu(z):
    odds = exp(-z)
    sigmoid = 1.0 / (1.0 + odds)
    return z * sigmoid, sigmoid * (1.0 + z * (odds * sigmoid))  # 1 - sigmoid would cancel


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of this name (`ops/functions.py`) and its derivative, at z."""
    value, slope = z, tl.full(z.shape, 1.0, tl.float32)
    if ACTIVATION == "gelu":
        value, slope = _gelu(z)
    elif ACTIVATION == "gelu_tanh":
        value, slope = _gelu_tanh(z)
    elif ACTIVATION == "silu":
        value, slope = _silu(z)
    elif ACTIVATION == "relu":
        value, slope = tl.where(z < 0.0, 0.0, z), tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "one_plus":
        value = 1.0 + z
    return value, slope
