"""LayerNorm, FiLM, GELU and dropout of rows of features in one pass, and their gradient in another.

What models/normalisation.py asks for, with n the normalised row, group that of the row and Φ the normal distribution:

    h = n gain + offset,    gain = weight scale[group],    offset = bias scale[group] + shift[group]
    out = keep / (1 - dropout) · (h Φ(h) if gelu else h)

bfloat16 comes as the bits of it, uint16; all arithmetic is in float32. Rows are taken in blocks that fit the nearest
cache, and a block in short loops, one after the other: the steps of one row wait for each other, those of many rows do
not.
"""

import numpy as np
from numba import njit, prange

from models.loops.common import BLOCK, VECTOR, array, compiled, convert
from models.loops.gelu import normal

f32, u32 = np.float32, np.uint32


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


@njit(**VECTOR)
def find_moments(x, eps, mean, inverse):
    """Of each row of x [N, channels]: its mean [N], and 1 / its standard deviation [N]."""
    rows, channels = x.shape
    share = f32(1) / f32(channels)
    for r in range(rows):
        total = f32(0)
        for c in range(channels):
            total += x[r, c]
        mean[r] = total * share
    for r in range(rows):
        middle, squares = mean[r], f32(0)
        for c in range(channels):
            squares += (x[r, c] - middle) * (x[r, c] - middle)
        inverse[r] = squares
    for r in range(rows):
        inverse[r] = f32(1) / np.sqrt(inverse[r] * share + f32(eps))


@njit(**VECTOR)
def standardise(x, mean, inverse):
    """x = its normalised rows."""
    for r in range(x.shape[0]):
        middle, inv = mean[r], inverse[r]
        for c in range(x.shape[1]):
            x[r, c] = (x[r, c] - middle) * inv


@njit(**VECTOR)
def scale_and_shift(x, gain, offset):
    """x = x gain + offset, for every row."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            x[r, c] = x[r, c] * gain[c] + offset[c]


@njit(**VECTOR)
def add_up(g, n, to_gain, to_offset):
    """to_gain and to_offset = the sums over all rows of g n and of g."""
    rows, channels = g.shape
    to_gain[:] = 0
    to_offset[:] = 0
    for r in range(rows // 2):  # two at a time, since reading and writing the sums costs as much as a term
        g0, g1, n0, n1 = g[2 * r], g[2 * r + 1], n[2 * r], n[2 * r + 1]
        for c in range(channels):
            to_gain[c] += g0[c] * n0[c] + g1[c] * n1[c]
            to_offset[c] += g0[c] + g1[c]
    if rows % 2:
        for c in range(channels):
            to_gain[c] += g[rows - 1, c] * n[rows - 1, c]
            to_offset[c] += g[rows - 1, c]


@njit(**VECTOR)
def differentiate_rows(g, n, gain, inverse):
    """g, the gradient of n gain + offset with the normalised rows n, becomes that of the rows."""
    rows, channels = g.shape
    share = f32(1) / f32(channels)
    along_ones, along_row = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for r in range(rows):
        ones, row = f32(0), f32(0)
        for c in range(channels):
            ones += g[r, c] * gain[c]
            row += g[r, c] * gain[c] * n[r, c]
        along_ones[r], along_row[r] = ones * share, row * share
    for r in range(rows):
        inv, ones, row = inverse[r], along_ones[r], along_row[r]
        for c in range(channels):
            g[r, c] = inv * (g[r, c] * gain[c] - ones - n[r, c] * row)


@njit(inline="always")
def gain_and_offset(weight, bias, scale, shift):
    """Of the rows of a group, from its scale and shift."""
    gain, offset = np.empty_like(weight), np.empty_like(bias)
    for c in range(weight.size):
        gain[c] = weight[c] * scale[c]
        offset[c] = bias[c] * scale[c] + shift[c]
    return gain, offset


@njit(inline="always")
def block_of(job, blocks, rows, step):
    """(group, first row, number of rows) of a job: every group of rows has as many blocks."""
    group, block = divmod(np.int64(job), blocks)
    return group, group * rows + block * step, min(step, rows - block * step)


@compiled(**VECTOR)
def forward(x, out, weight, bias, scale, shift, moments, kind, groups, rows, channels, eps, gelu, dropout, seed, other):
    """See above; tensors come as their addresses.

    x              [groups, rows, channels], float32 or the bits of bfloat16, of which kind is one number
    out            like x, written
    weight, bias   float32 [channels]
    scale, shift   float32 [groups, channels]
    moments        float32 [2, groups * rows], written: mean of each row, and 1 / standard deviation
    dropout        probability in [0, 1); which numbers, say seed and other, integers in [0, 2^32)
    """
    size = groups * rows * channels
    x, out = array(x, size, kind), array(out, size, kind)
    weight, bias = array(weight, channels, f32(0)), array(bias, channels, f32(0))
    scale, shift = array(scale, (groups, channels), f32(0)), array(shift, (groups, channels), f32(0))
    mean, inverse = array(moments, (2, groups * rows), f32(0))
    step = max(BLOCK // channels, 1)
    blocks = (rows + step - 1) // step
    for job in prange(groups * blocks):
        group, first, count = block_of(job, blocks, rows, step)
        part, here = slice(first * channels, (first + count) * channels), slice(first, first + count)
        gain, offset = gain_and_offset(weight, bias, scale[group], shift[group])
        h = np.empty(count * channels, np.float32)
        h_rows = h.reshape(count, channels)
        convert(x[part], h)
        find_moments(h_rows, eps, mean[here], inverse[here])
        standardise(h_rows, mean[here], inverse[here])
        scale_and_shift(h_rows, gain, offset)
        if gelu:
            for i in range(h.size):
                density, distribution = normal(h[i])
                h[i] *= distribution
        if dropout > 0:
            drop(h, first * channels, dropout, seed, other)
        convert(h, out[part])


@compiled(**VECTOR)
def backward(
    x, grad, residual, grad_x, weight, bias, scale, shift, moments, grad_weight, grad_bias, grad_scale, grad_shift,
    kind, groups, rows, channels, add, gelu, dropout, seed, other,
):
    """The gradients of `forward`, from grad, that of its result: each like what it belongs to, written.

    residual   like x, is added to the gradient of x where `add`, and not read otherwise
    """
    size = groups * rows * channels
    x, grad, grad_x = array(x, size, kind), array(grad, size, kind), array(grad_x, size, kind)
    residual = array(residual, size, kind)
    weight, bias = array(weight, channels, f32(0)), array(bias, channels, f32(0))
    scale, shift = array(scale, (groups, channels), f32(0)), array(shift, (groups, channels), f32(0))
    mean, inverse = array(moments, (2, groups * rows), f32(0))
    step = max(BLOCK // channels, 1)
    blocks = (rows + step - 1) // step
    partial = np.empty((groups * blocks, 2, channels), np.float32)  # gradients of gain and offset
    for job in prange(groups * blocks):
        group, first, count = block_of(job, blocks, rows, step)
        part, here = slice(first * channels, (first + count) * channels), slice(first, first + count)
        gain, offset = gain_and_offset(weight, bias, scale[group], shift[group])
        n, g = np.empty(count * channels, np.float32), np.empty(count * channels, np.float32)
        convert(x[part], n)
        convert(grad[part], g)
        n_rows, g_rows = n.reshape(count, channels), g.reshape(count, channels)
        standardise(n_rows, mean[here], inverse[here])
        if dropout > 0:
            drop(g, first * channels, dropout, seed, other)
        if gelu:
            h = n.copy()
            scale_and_shift(h.reshape(count, channels), gain, offset)
            for i in range(h.size):
                density, distribution = normal(h[i])
                g[i] *= distribution + h[i] * density
        add_up(g_rows, n_rows, partial[job, 0], partial[job, 1])
        differentiate_rows(g_rows, n_rows, gain, inverse[here])
        if add:
            convert(residual[part], n)
            for i in range(g.size):
                g[i] += n[i]
        convert(g, grad_x[part])

    grad_weight, grad_bias = array(grad_weight, channels, f32(0)), array(grad_bias, channels, f32(0))
    grad_scale = array(grad_scale, (groups, channels), f32(0))
    grad_shift = array(grad_shift, (groups, channels), f32(0))
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
