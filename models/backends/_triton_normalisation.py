"""LayerNorm, FiLM, GELU and dropout of rows of features in one Triton kernel, and their gradient in another.

With n the normalised row, group that of the row (an image) and Φ the normal distribution, as in the loops for a CPU:

    h = n gain + offset,    gain = weight scale[group],    offset = bias scale[group] + shift[group]
    out = keep / (1 - dropout) · (h Φ(h) if gelu else h)

A program owns whole rows of one group, a few at a time, and keeps them in registers: the features are read once and the
result is written once, in their own dtype, and all arithmetic is in float32. Nothing is added atomically: the same
input gives the same bits. Arguments that the kernels share:

    x, out, grad, grad_x     [groups · rows, channels], contiguous, float32, bfloat16 or float16
    weight, bias             float32 [channels]
    scale, shift             float32 [groups, channels], each with the stride of its groups
    mean, inverse            float32 [groups · rows], the mean of each row and 1 / its standard deviation
    factor, limit            1 / (1 - dropout), and the 32 random bits, as a number, below which a number is dropped
    seed, other              which numbers these are; like limit, integers in [0, 2^32) as the int32 of the same bits
    GELU, DROPOUT            whether there is one
    BLOCK_R, BLOCK_C         rows at a time, and a power of two that is not less than channels

Imported only where Triton is installed.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)
RANDOM = ("limit", "seed", "other")  # else there would be a kernel for seeds that 16 divides, and one for the others


@triton.jit
def gain_and_offset(weight, bias, scale, shift, column, inside):
    """Of the rows of the group that scale and shift point to: two rows [1, BLOCK_C]."""
    scale = tl.load(scale + column, mask=inside, other=0.0)
    gain = tl.load(weight + column, mask=inside, other=0.0) * scale
    offset = tl.load(bias + column, mask=inside, other=0.0) * scale + tl.load(shift + column, mask=inside, other=0.0)
    return gain[None, :], offset[None, :]


@triton.jit
def distribution(h):
    """The normal distribution at h."""
    return 0.5 + 0.5 * tl.math.erf(h * SQRT_HALF)


@triton.jit
def drop(values, first, place, factor, limit, seed, other):
    """keep / (1 - dropout) · values, of the numbers first + place of a tensor: models.loops.normalisation.mix."""
    number = first.to(tl.uint32) + place.to(tl.uint32)
    bits = number * 0x9E3779B9 + seed.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B ^ other.to(tl.uint32)
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = bits ^ (bits >> 16)
    return values * tl.where(bits >= limit.to(tl.uint32), factor, 0.0)


@triton.jit(do_not_specialize=RANDOM)
def forward(
    x, out, weight, bias, scale, shift, mean, inverse, rows, channels, scale_stride, shift_stride, eps, factor, limit,
    seed, other, GELU: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out, mean and inverse, written. Programs: blocks of rows, those of a group one after the other."""
    blocks = tl.cdiv(rows, BLOCK_R)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_R  # of the rows of the group
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    exists, inside = first + row < rows, column < channels
    present = exists[:, None] & inside[None, :]
    place = row[:, None] * channels + column[None, :]
    first += group * rows

    h = tl.load(x + first * channels + place, mask=present, other=0.0).to(tl.float32)
    middle = tl.sum(h, axis=1) / channels
    h = tl.where(present, h - middle[:, None], 0.0)
    inv = 1 / tl.sqrt(tl.sum(h * h, axis=1) / channels + eps)
    tl.store(mean + first + row, middle, mask=exists)
    tl.store(inverse + first + row, inv, mask=exists)

    scale, shift = scale + group * scale_stride, shift + group * shift_stride
    gain, offset = gain_and_offset(weight, bias, scale, shift, column, inside)
    h = h * inv[:, None] * gain + offset
    if GELU:
        h *= distribution(h)
    if DROPOUT:
        h = drop(h, first * channels, place, factor, limit, seed, other)
    tl.store(out + first * channels + place, h.to(out.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=RANDOM)
def backward(
    x, grad, grad_x, weight, bias, scale, shift, mean, inverse, partial, rows, channels, parts, span, scale_stride,
    shift_stride, factor, limit, seed, other,
    GELU: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x, and what the rows of a part add to the gradients of gain and offset, written.

    partial     float32 [groups · parts, 2, channels]
    Programs: parts of `span` rows, those of a group one after the other.
    """
    group, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    inside = column < channels
    place = row[:, None] * channels + column[None, :]
    scale, shift = scale + group * scale_stride, shift + group * shift_stride
    gain, offset = gain_and_offset(weight, bias, scale, shift, column, inside)
    to_gain = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    to_offset = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for of_group in range(part * span, tl.minimum((part + 1) * span, rows), BLOCK_R):
        exists = of_group + row < rows
        present = exists[:, None] & inside[None, :]
        first = group * rows + of_group
        n = tl.load(x + first * channels + place, mask=present, other=0.0).to(tl.float32)
        g = tl.load(grad + first * channels + place, mask=present, other=0.0).to(tl.float32)
        inv = tl.load(inverse + first + row, mask=exists, other=0.0)[:, None]
        n = (n - tl.load(mean + first + row, mask=exists, other=0.0)[:, None]) * inv
        if DROPOUT:
            g = drop(g, first * channels, place, factor, limit, seed, other)
        if GELU:
            h = n * gain + offset
            g *= distribution(h) + h * DENSITY_AT_0 * tl.exp(-0.5 * h * h)
        to_gain += g * n
        to_offset += g
        g *= gain
        along_ones, along_row = tl.sum(g, axis=1) / channels, tl.sum(g * n, axis=1) / channels
        g = inv * (g - along_ones[:, None] - n * along_row[:, None])
        tl.store(grad_x + first * channels + place, g.to(grad_x.dtype.element_ty), mask=present)
    sums = partial + tl.program_id(0).to(tl.int64) * 2 * channels + column
    tl.store(sums, tl.sum(to_gain, axis=0), mask=inside)
    tl.store(sums + channels, tl.sum(to_offset, axis=0), mask=inside)
