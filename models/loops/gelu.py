"""GELU and its gradient, h Φ(h) and Φ(h) + h φ(h) with the normal distribution Φ and its density φ.

The bias of the Linear before it is added in passing: PyTorch would write it to all rows, and read it from there.
"""

import numpy as np
from numba import njit, prange

from models.loops.common import BLOCK, VECTOR, array, compiled, convert

f32, i32 = np.float32, np.int32
LOG2_E = f32(1.4426950408889634)
LN_2_HIGH, LN_2_LOW = f32(0.693359375), f32(-2.12194440e-4)  # ln 2 in two parts, the first of few digits
SMALLEST = f32(-80)  # exp of it, 2e-35, is far from the subnormal numbers
# Taylor series of exp, exact to a rounding for |x| <= ln(2) / 2
E6, E5, E4, E3, E2 = f32(1 / 720), f32(1 / 120), f32(1 / 24), f32(1 / 6), f32(1 / 2)
# Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.17, whose error is below 7.5e-8
DENSITY_AT_0 = f32(0.3989422804014327)
P, B1, B2, B3, B4, B5 = map(f32, (0.2316419, 0.319381530, -0.356563782, 1.781477937, -1.821255978, 1.330274429))


@njit(inline="always", error_model="numpy")
def exp_of_negative(x):
    """exp(x) of x <= 0, within 3e-7 of itself; 0 below -80."""
    tiny, x = x < SMALLEST, max(x, SMALLEST)
    n = np.floor(x * LOG2_E + f32(0.5))
    x = (x - n * LN_2_HIGH) - n * LN_2_LOW
    series = (((((E6 * x + E5) * x + E4) * x + E3) * x + E2) * x + f32(1)) * x + f32(1)
    value = series * i32((i32(n) + i32(127)) << i32(23)).view(np.float32)  # 2^n: n in the bits of the exponent
    return f32(0) if tiny else value


@njit(inline="always", error_model="numpy")
def normal(h):
    """(density, distribution function) of the normal distribution at h."""
    density = DENSITY_AT_0 * exp_of_negative(f32(-0.5) * h * h)
    t = f32(1) / (f32(1) + P * abs(h))
    tail = density * t * (B1 + t * (B2 + t * (B3 + t * (B4 + t * B5))))
    return density, (tail if h < f32(0) else f32(1) - tail)


@njit(inline="always")
def add(bias, rows):
    """rows [N, C] += bias [C]."""
    for r in range(rows.shape[0]):
        for c in range(rows.shape[1]):
            rows[r, c] += bias[c]


@compiled(**VECTOR)
def forward(h, bias, kind, rows, channels):
    """h = GELU(h + bias); tensors come as their addresses.

    h       [rows, channels], float32 or the bits of bfloat16, of which kind is one number
    bias    float32 [channels]
    """
    h, bias = array(h, rows * channels, kind), array(bias, channels, f32(0))
    step = max(BLOCK // channels, 1)
    for job in prange((rows + step - 1) // step):
        part = slice(job * step * channels, min((job + 1) * step, rows) * channels)
        values = np.empty(h[part].size, np.float32)
        convert(h[part], values)
        add(bias, values.reshape(-1, channels))
        for i in range(values.size):
            density, distribution = normal(values[i])
            values[i] *= distribution
        convert(values, h[part])


@compiled(**VECTOR)
def backward(h, bias, grad, kind, rows, channels):
    """grad, the gradient of GELU(h + bias), becomes that of h, and h = GELU(h + bias)."""
    h, grad = array(h, rows * channels, kind), array(grad, rows * channels, kind)
    bias = array(bias, channels, f32(0))
    step = max(BLOCK // channels, 1)
    for job in prange((rows + step - 1) // step):
        part = slice(job * step * channels, min((job + 1) * step, rows) * channels)
        values, g = np.empty(h[part].size, np.float32), np.empty(h[part].size, np.float32)
        convert(h[part], values)
        convert(grad[part], g)
        add(bias, values.reshape(-1, channels))
        for i in range(values.size):
            density, distribution = normal(values[i])
            g[i] *= distribution + values[i] * density
            values[i] *= distribution
        convert(g, grad[part])
        convert(values, h[part])
