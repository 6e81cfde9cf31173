"""The Triton kernels of models/kernels/gpu.py. Imported only if Triton is installed.

The neighbour sum and its gradient in the weight:

    (S h)(p) = sum over taps of weight[tap] h(p + tap), over the points that exist
    dκ[tap]  = sum over points p of h(p + tap) g(p)ᵀ

A program owns a block of points and of channels, and loops over the taps of the window. At each tap it looks up the
points in the table and loads their features, mostly from cache, because the windows of neighbours overlap. One program
writes each result, without atomic additions, so that results are bit-identical between runs.

    features, grad   [N, channels], contiguous; N counts the points of all images
    weight           [kh · kw, C] or [kh · kw, C, D], contiguous
    position, table  models.kernels.gpu._geometry; stride is the width of the table

Sums are taken in float32. Sizes need not be multiples of blocks: entries beyond an edge are masked.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(2**62)  # further than any pixel: squared distances are integers below 2^53


@triton.jit
def neighbours(tap, table, position, exists, stride, KH: tl.constexpr, KW: tl.constexpr):
    """(int64 points that a block of points sees at a tap, mask of those that exist)."""
    near = tl.load(table + position + (tap // KW - KH // 2) * stride + tap % KW - KW // 2, mask=exists, other=-1)
    return near.to(tl.int64), near >= 0


@triton.jit
def rows(matrix, point, present, channel, channels):
    """Block [P, Q] of matrix [N, channels]: rows point, columns channel; zero where a point does not exist."""
    mask = present[:, None] & (channel < channels)[None, :]
    return tl.load(matrix + point[:, None] * channels + channel[None, :], mask=mask, other=0.0)


@triton.jit
def depthwise(
    features, weight, position, table, out, points, stride, channels,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[p] = (S h)(p). Programs: blocks of points, blocks of channels."""
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = point < points
    at = tl.load(position + point, mask=exists, other=0)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in range(KH * KW):
        near, present = neighbours(tap, table, at, exists, stride, KH, KW)
        w = tl.load(weight + tap * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
        total += w[None, :] * rows(features, near, present, channel, channels).to(tl.float32)
    place = point.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out + place, total, mask=exists[:, None] & (channel < channels)[None, :])


@triton.jit
def full(
    features, weight, position, table, out, points, stride, inputs, outputs, KH: tl.constexpr, KW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The same with a matrix per tap, by tensor cores. Programs: blocks of points, blocks of outputs."""
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    exists = point < points
    at = tl.load(position + point, mask=exists, other=0)
    total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    slices = tl.cdiv(inputs, BLOCK_I)
    for step in range(KH * KW * slices):  # one loop, so that the next tap is fetched while this one is multiplied
        tap = step // slices
        channel = step % slices * BLOCK_I + tl.arange(0, BLOCK_I)
        near, present = neighbours(tap, table, at, exists, stride, KH, KW)
        h = rows(features, near, present, channel, inputs)
        place = (tap * inputs + channel)[:, None] * outputs + output[None, :]
        w = tl.load(weight + place, mask=(channel < inputs)[:, None] & (output < outputs)[None, :], other=0.0)
        total = tl.dot(h, w, total, input_precision=PRECISION)
    place = point.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(out + place, total, mask=exists[:, None] & (output < outputs)[None, :])


@triton.jit
def depthwise_weight_gradient(
    features, grad, position, table, out, points, stride, channels, span,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[part, tap] = terms of points part · span ... (part + 1) · span - 1 in dκ[tap], float32 [parts, kh · kw, C].

    The parts are summed afterwards, in order. Programs: parts and taps, blocks of channels. The taps of a part run
    side by side, so that its points stay in the cache.
    """
    part, tap = tl.program_id(0) // (KH * KW), tl.program_id(0) % (KH * KW)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, span, BLOCK_P):
        point = part * span + first + tl.arange(0, BLOCK_P)
        exists = point < points
        at = tl.load(position + point, mask=exists, other=0)
        near, present = neighbours(tap, table, at, exists, stride, KH, KW)
        h = rows(features, near, present, channel, channels).to(tl.float32)
        total += h * rows(grad, point.to(tl.int64), present, channel, channels).to(tl.float32)
    place = tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(out + place, tl.sum(total, axis=0), mask=channel < channels)


@triton.jit
def full_weight_gradient(
    features, grad, position, table, out, points, stride, inputs, outputs, span, KH: tl.constexpr, KW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The same with a matrix per tap; out float32 [parts, kh · kw, C, D]. Programs: parts and taps, inputs, outputs."""
    part, tap = tl.program_id(0) // (KH * KW), tl.program_id(0) % (KH * KW)
    channel = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    output = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for first in range(0, span, BLOCK_P):
        point = part * span + first + tl.arange(0, BLOCK_P)
        exists = point < points
        at = tl.load(position + point, mask=exists, other=0)
        near, present = neighbours(tap, table, at, exists, stride, KH, KW)
        h = rows(features, near, present, channel, inputs)
        g = rows(grad, point.to(tl.int64), present, output, outputs)
        total = tl.dot(tl.trans(h), g, total, input_precision=PRECISION)
    place = (tl.program_id(0).to(tl.int64) * inputs + channel)[:, None] * outputs + output[None, :]
    tl.store(out + place, total, mask=(channel < inputs)[:, None] & (output < outputs)[None, :])


@triton.jit
def nearest(
    table, place, squared_distance, height, width, row_unit, column_unit, scale, G: tl.constexpr, K: tl.constexpr,
    SLOTS: tl.constexpr, REACH: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The nearest pixels of one node per program, among the pixels within REACH of it if that is enough, or else all.

    table             int32 [B, H · W]
    place             int64 [B · G², SLOTS], squared_distance float32, likewise: written for the K nearest pixels and
                      for those exactly as far as the K-th
    row_unit ...      W / g, H / g and 2 H W G / g with g = gcd(H, W): distances are integers, in units of 1 / scale
    """
    node = tl.program_id(0).to(tl.int64)
    i, j = node // G % G, node % G
    table += node // (G * G) * height * width
    place += node * SLOTS
    squared_distance += node * SLOTS

    top, left = (2 * i + 1) * height // (2 * G) - REACH, (2 * j + 1) * width // (2 * G) - REACH
    step = tl.arange(0, SIDE * SIDE)
    row, column = top + step // SIDE, left + step % SIDE
    inside = (step // SIDE < 2 * REACH + 1) & (step % SIDE < 2 * REACH + 1)
    inside = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixel = row * width + column
    squared = distances(table, pixel, inside, i, j, height, width, row_unit, column_unit, G)
    slot, last, last_pixel, furthest = 0, tl.full((), -1, tl.int64), tl.full((), -1, tl.int64), FAR
    while slot < SLOTS:
        best, best_pixel = next_nearest(squared, pixel, last, last_pixel)
        furthest = tl.where(slot == K - 1, best, furthest)
        if (best == FAR) | (best > furthest):
            slot = SLOTS
        else:
            write(place, squared_distance, slot, table, best, best_pixel, scale)
            last, last_pixel, slot = best, best_pixel, slot + 1

    # Pixels beyond the window are at least as far as the nearest pixel just outside of its four sides.
    up = row_unit * ((2 * i + 1) * height - (2 * (top - 1) + 1) * G)
    down = row_unit * ((2 * (top + 2 * REACH + 1) + 1) * G - (2 * i + 1) * height)
    before = column_unit * ((2 * j + 1) * width - (2 * (left - 1) + 1) * G)
    after = column_unit * ((2 * (left + 2 * REACH + 1) + 1) * G - (2 * j + 1) * width)
    certain = tl.minimum(tl.minimum(up, down), tl.minimum(before, after))
    if furthest >= certain * certain:
        search_all(table, place, squared_distance, i, j, height, width, row_unit, column_unit, scale, G, K, SLOTS,
        PIXELS)


@triton.jit
def search_all(
    table, place, squared_distance, i, j, height, width, row_unit, column_unit, scale,
    G: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The same among all pixels: one pass over the image for each pixel found."""
    slot, last, last_pixel, furthest = 0, tl.full((), -1, tl.int64), tl.full((), -1, tl.int64), FAR
    while slot < SLOTS:
        best, best_pixel = tl.full((), FAR, tl.int64), tl.full((), 0, tl.int64)
        for first in range(0, height * width, PIXELS):
            pixel = (first + tl.arange(0, PIXELS)).to(tl.int64)
            squared = distances(table, pixel, pixel < height * width, i, j, height, width, row_unit, column_unit, G)
            near, near_pixel = next_nearest(squared, pixel, last, last_pixel)
            best_pixel = tl.where(near < best, near_pixel, best_pixel)
            best = tl.minimum(near, best)
        furthest = tl.where(slot == K - 1, best, furthest)
        if (best == FAR) | (best > furthest):
            slot = SLOTS
        else:
            write(place, squared_distance, slot, table, best, best_pixel, scale)
            last, last_pixel, slot = best, best_pixel, slot + 1


@triton.jit
def distances(table, pixel, inside, i, j, height, width, row_unit, column_unit, G: tl.constexpr):
    """Squared distances of pixels from node (i, j); FAR for those that are absent or not `inside`."""
    present = tl.load(table + pixel, mask=inside, other=-1) >= 0
    from_row = row_unit * ((2 * (pixel // width) + 1) * G - (2 * i + 1) * height)
    from_column = column_unit * ((2 * (pixel % width) + 1) * G - (2 * j + 1) * width)
    return tl.where(present, from_row * from_row + from_column * from_column, FAR)


@triton.jit
def next_nearest(squared, pixel, last, last_pixel):
    """(squared distance, pixel) of the nearest pixel that comes after `last`, in order of distance, then of pixel."""
    after = (squared > last) | ((squared == last) & (pixel > last_pixel))
    squared = tl.where(after, squared, FAR)
    best = tl.min(squared)
    return best, tl.min(tl.where(squared == best, pixel, FAR))


@triton.jit
def write(place, squared_distance, slot, table, best, best_pixel, scale):
    tl.store(place + slot, tl.load(table + best_pixel).to(tl.int64))
    tl.store(squared_distance + slot, (best.to(tl.float64) / (scale.to(tl.float64) * scale)).to(tl.float32))
