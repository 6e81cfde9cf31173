"""LayerNorm, FiLM, GELU and dropout of rows of features in one pass, and their gradient in another.

What models/normalisation.py asks for, with n the normalised row, group that of the row and Φ the normal distribution:

    h = n gain + offset,    gain = weight scale[group],    offset = bias scale[group] + shift[group]
    out = keep / (1 - dropout) · (h Φ(h) if gelu else h)

bfloat16 comes as the bits of it, uint16; all arithmetic is in float32. Rows are taken in blocks that fit the nearest
cache. Loops over all numbers of a block, rather than over the few of a row, are what the vector units like best.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from models.loops.common import compiled

BLOCK = 4096  # numbers that one thread takes at a time; the order of sums depends on it, never on the number of threads
REDUCE = {"contract", "reassoc", "nsz"}  # sums in any order; NaN and infinity stay what they are
VECTOR = {"fastmath": REDUCE, "error_model": "numpy"}  # the error model of Python tests every division for zero

f32, u16, u32, i32 = np.float32, np.uint16, np.uint32, np.int32
LOG2_E = f32(1.4426950408889634)
LN_2_HIGH, LN_2_LOW = f32(0.693359375), f32(-2.12194440e-4)  # ln 2 in two parts, the first of few digits
SMALLEST = f32(-80)  # exp of it, 2e-35, is far from the subnormal numbers
# Taylor series of exp, exact to a rounding for |x| <= ln(2) / 2
E6, E5, E4, E3, E2 = f32(1 / 720), f32(1 / 120), f32(1 / 24), f32(1 / 6), f32(1 / 2)
# Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.17, whose error is below 7.5e-8
DENSITY_AT_0 = f32(0.3989422804014327)
P, B1, B2, B3, B4, B5 = map(f32, (0.2316419, 0.319381530, -0.356563782, 1.781477937, -1.821255978, 1.330274429))


def convert(source, target):
    """target = source, either in float32 or bfloat16, to which it is rounded to the nearest, ties to even."""


@overload(convert, inline="always")
def _convert(source, target):
    """The code for the types of the arrays."""
    if source.dtype == types.uint16:

        def code(source, target):
            bits = target.view(np.uint32)
            for i in range(source.size):
                bits[i] = u32(source[i]) << u32(16)

    elif target.dtype == types.uint16:

        def code(source, target):
            bits = source.view(np.uint32)
            for i in range(source.size):
                rounded = (bits[i] + u32(0x7FFF) + ((bits[i] >> u32(16)) & u32(1))) >> u32(16)
                target[i] = u16(rounded) if source[i] == source[i] else u16(0x7FC0)

    else:

        def code(source, target):
            for i in range(source.size):
                target[i] = source[i]

    return code


@njit(inline="always", error_model="numpy")
def exp_of_negative(x):
    """exp(x) of x <= 0, within 3e-7 of itself; 2e-35 below -80."""
    x = max(x, SMALLEST)
    n = np.floor(x * LOG2_E + f32(0.5))
    x = (x - n * LN_2_HIGH) - n * LN_2_LOW
    series = (((((E6 * x + E5) * x + E4) * x + E3) * x + E2) * x + f32(1)) * x + f32(1)
    return series * i32((i32(n) + i32(127)) << i32(23)).view(np.float32)  # 2^n: n in the bits of the exponent


@njit(inline="always", error_model="numpy")
def normal(h):
    """(density, distribution function) of the normal distribution at h."""
    density = DENSITY_AT_0 * exp_of_negative(f32(-0.5) * h * h)
    t = f32(1) / (f32(1) + P * abs(h))
    tail = density * t * (B1 + t * (B2 + t * (B3 + t * (B4 + t * B5))))
    return density, (tail if h < f32(0) else f32(1) - tail)


@njit(inline="always")
def mix(i, seed, other):
    """Random bits of number i: the finaliser of MurmurHash3, with a seed before and one within."""
    bits = u32(u32(i) * u32(0x9E3779B9) + u32(seed))
    bits = u32((bits ^ (bits >> u32(16))) * u32(0x85EBCA6B)) ^ u32(other)
    bits = u32((bits ^ (bits >> u32(13))) * u32(0xC2B2AE35))
    return bits ^ (bits >> u32(16))


@njit(inline="always", error_model="numpy")
def drop(values, first, dropout, seed, other):
    """values = keep / (1 - dropout) · values; those of a tensor from number `first` on."""
    limit, factor = u32(dropout * 4294967296.0), f32(1 / (1 - dropout))
    for i in range(values.size):
        values[i] *= factor if mix(first + i, seed, other) >= limit else f32(0)


@compiled(**VECTOR)
def forward(x, weight, bias, scale, shift, eps, gelu, dropout, seed, other, moments, out):
    """See above.

    x              float32 or bfloat16 [..., channels], contiguous: N rows of which the same number is in each group
    weight, bias   float32 [channels]
    scale, shift   float32 [groups, channels]
    dropout        probability in [0, 1); which numbers, say seed and other, integers in [0, 2^32)
    moments        float32 [2, N], written: mean of each row, and 1 / standard deviation
    out            float32 or bfloat16 [..., channels], written
    """
    channels, groups = weight.size, len(scale)
    mean, inverse = moments
    x, out = x.reshape(-1), out.reshape(-1)
    rows = mean.size // groups
    step = max(BLOCK // channels, 1)
    blocks = (rows + step - 1) // step
    for job in prange(groups * blocks):
        group, block = divmod(np.int64(job), blocks)
        first = group * rows + block * step
        count = min(step, rows - block * step)
        part = slice(first * channels, (first + count) * channels)
        h = np.empty(count * channels, np.float32)
        gain, offset = np.empty(channels, np.float32), np.empty(channels, np.float32)
        for c in range(channels):
            gain[c] = weight[c] * scale[group, c]
            offset[c] = bias[c] * scale[group, c] + shift[group, c]
        convert(x[part], h)
        for r in range(count):
            row = h[r * channels : (r + 1) * channels]
            total = f32(0)
            for c in range(channels):
                total += row[c]
            middle = f32(total / f32(channels))
            squares = f32(0)
            for c in range(channels):
                squares += (row[c] - middle) * (row[c] - middle)
            inv = f32(f32(1) / np.sqrt(f32(squares / f32(channels)) + f32(eps)))
            mean[first + r], inverse[first + r] = middle, inv
            for c in range(channels):
                row[c] = (row[c] - middle) * inv * gain[c] + offset[c]
        if gelu:
            for i in range(h.size):
                density, distribution = normal(h[i])
                h[i] *= distribution
        if dropout > 0:
            drop(h, first * channels, dropout, seed, other)
        convert(h, out[part])


@compiled(**VECTOR)
def backward(
    x, weight, bias, scale, shift, gelu, dropout, seed, other, moments, grad, grad_x, grad_weight, grad_bias,
    grad_scale, grad_shift,
):
    """The gradients of `forward`, from grad, that of its result: each like what it belongs to, written."""
    channels, groups = weight.size, len(scale)
    mean, inverse = moments
    x, grad, grad_x = x.reshape(-1), grad.reshape(-1), grad_x.reshape(-1)
    rows = mean.size // groups
    step = max(BLOCK // channels, 1)
    blocks = (rows + step - 1) // step
    partial = np.empty((groups * blocks, 2, channels), np.float32)  # gradients of gain and offset
    for job in prange(groups * blocks):
        group, block = divmod(np.int64(job), blocks)
        first = group * rows + block * step
        count = min(step, rows - block * step)
        part = slice(first * channels, (first + count) * channels)
        n, g = np.empty(count * channels, np.float32), np.empty(count * channels, np.float32)
        gain, offset = np.empty(channels, np.float32), np.empty(channels, np.float32)
        for c in range(channels):
            gain[c] = weight[c] * scale[group, c]
            offset[c] = bias[c] * scale[group, c] + shift[group, c]
        convert(x[part], n)
        convert(grad[part], g)
        for r in range(count):
            row, middle, inv = n[r * channels : (r + 1) * channels], mean[first + r], inverse[first + r]
            for c in range(channels):
                row[c] = (row[c] - middle) * inv
        if dropout > 0:
            drop(g, first * channels, dropout, seed, other)
        if gelu:
            h = np.empty(count * channels, np.float32)
            for r in range(count):
                for c in range(channels):
                    h[r * channels + c] = n[r * channels + c] * gain[c] + offset[c]
            for i in range(h.size):
                density, distribution = normal(h[i])
                g[i] *= distribution + h[i] * density
        to_gain, to_offset = partial[job, 0], partial[job, 1]
        to_gain[:] = 0
        to_offset[:] = 0
        for r in range(count):
            row, row_grad = n[r * channels : (r + 1) * channels], g[r * channels : (r + 1) * channels]
            along_ones, along_row = f32(0), f32(0)
            for c in range(channels):
                to_offset[c] += row_grad[c]
                to_gain[c] += row_grad[c] * row[c]
                along_ones += row_grad[c] * gain[c]
                along_row += row_grad[c] * gain[c] * row[c]
            along_ones, along_row = f32(along_ones / f32(channels)), f32(along_row / f32(channels))
            inv = inverse[first + r]
            for c in range(channels):
                row_grad[c] = inv * (row_grad[c] * gain[c] - along_ones - row[c] * along_row)
        convert(g, grad_x[part])

    grad_weight[:] = 0
    grad_bias[:] = 0
    for group in range(groups):
        total = np.zeros((2, channels), np.float32)
        for block in range(blocks):
            for c in range(channels):
                total[0, c] += partial[group * blocks + block, 0, c]
                total[1, c] += partial[group * blocks + block, 1, c]
        for c in range(channels):
            grad_weight[c] += total[0, c] * scale[group, c]
            grad_bias[c] += total[1, c] * scale[group, c]
            grad_scale[group, c] = total[0, c] * weight[c] + total[1, c] * bias[c]
            grad_shift[group, c] = total[1, c]
