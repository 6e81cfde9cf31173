"""The depthwise sparse operator; models/backends/numba.py says how the loops are used."""

import numpy as np
from numba import njit, prange

from models.loops.common import compiled

CHUNK = 512  # points that one thread takes at a time; the order of sums depends on it, never on the number of threads
ROWS = 4  # likewise rows of an image
COLUMNS = 32  # of features and gradients, which then stay in the nearest cache
# one rounding per multiply-add and any order of four terms, but unlike fastmath=True right with NaN and infinity, which
# the trainer and the loss scaling of float16 look for
MULTIPLY_ADD = {"contract", "reassoc"}


@compiled()
def neighbours(index, table, kernel_size, start, near, tap):
    """List the points in the window of every point, in raster order, as correlate takes them.

    index int64 [B, L]; table int32 [B, H, W] (Coordinates.table); start int64 [B * L + 1], where the part of each point
    begins; near int32 [pairs] and tap int16 [pairs], written.
    """
    batch, height, width = table.shape
    points = index.shape[1]
    kh, kw = kernel_size
    for point in prange(batch * points):
        image, place = divmod(np.int64(point), points)
        row, column = divmod(index[image, place], width)
        pair = start[point]
        for i in range(max(0, kh // 2 - row), min(kh, kh // 2 + height - row)):
            for j in range(max(0, kw // 2 - column), min(kw, kw // 2 + width - column)):
                found = table[image, row + i - kh // 2, column + j - kw // 2]
                if found >= 0:
                    near[pair] = image * points + found
                    tap[pair] = i * kw + j
                    pair += 1


@compiled(fastmath=MULTIPLY_ADD)
def correlate(features, weight, start, near, tap, before, after, out):
    """out[p] = after[p] · sum over the neighbours of p of weight[tap] * before[near] * features[near], by channel.

    features [N, C], the points of all images; weight [kh * kw, C]; before and after [N]; out [N, C], written.
    """
    points, channels = features.shape
    for chunk in prange((points + CHUNK - 1) // CHUNK):
        first = np.int64(chunk) * CHUNK
        for p in range(first, min(points, first + CHUNK)):
            total = out[p]
            total[:] = 0
            n, last = start[p], start[p + 1]
            while n + 3 < last:  # four at a time, since reading and writing the total costs as much as a term
                w0, w1, w2, w3 = weight[tap[n]], weight[tap[n + 1]], weight[tap[n + 2]], weight[tap[n + 3]]
                p0, p1, p2, p3 = near[n], near[n + 1], near[n + 2], near[n + 3]
                h0, h1, h2, h3 = features[p0], features[p1], features[p2], features[p3]
                f0, f1, f2, f3 = before[p0], before[p1], before[p2], before[p3]
                for c in range(channels):
                    total[c] += f0 * w0[c] * h0[c] + f1 * w1[c] * h1[c] + f2 * w2[c] * h2[c] + f3 * w3[c] * h3[c]
                n += 4
            while n < last:
                w0, h0, f0 = weight[tap[n]], features[near[n]], before[near[n]]
                for c in range(channels):
                    total[c] += f0 * w0[c] * h0[c]
                n += 1
            for c in range(channels):
                total[c] *= after[p]


@compiled(fastmath=MULTIPLY_ADD)
def weight_gradient(features, grad, start, near, tap, before, after, out):
    """out[t] = sum over the pairs (p, near) with tap t of before[near] features[near] * after[p] grad[p], by channel.

    features and grad [N, C]; before and after [N]; out [kh * kw, C], written. Each chunk of points has its own sum, and
    these are added in order.
    """
    points, channels = features.shape
    chunks = (points + CHUNK - 1) // CHUNK
    partial = np.empty((chunks, *out.shape), out.dtype)
    for chunk in prange(chunks):
        partial[chunk] = 0
        first = np.int64(chunk) * CHUNK
        for p in range(first, min(points, first + CHUNK)):
            g = grad[p]
            for n in range(start[p], start[p + 1]):
                total, h, f = partial[chunk, tap[n]], features[near[n]], before[near[n]] * after[p]
                for c in range(channels):
                    total[c] += f * g[c] * h[c]
    add_up(partial, out)


@compiled(fastmath=MULTIPLY_ADD)
def image_weight_gradient(image, grad, kernel_size, out):
    """As weight_gradient, where every pixel is present: image and grad [B, H, W, C], out [kh * kw, C].

    F.conv2d computes the other two products well, but this one four times slower than the loop.
    """
    batch, height, width, channels = image.shape
    kh, kw = kernel_size
    chunks = (height + ROWS - 1) // ROWS
    partial = np.empty((batch * chunks, *out.shape), out.dtype)
    for job in prange(batch * chunks):
        b, chunk = divmod(np.int64(job), chunks)
        partial[job] = 0
        for y in range(chunk * ROWS, min(height, (chunk + 1) * ROWS)):
            for left in range(0, width, COLUMNS):
                for i in range(max(0, kh // 2 - y), min(kh, kh // 2 + height - y)):
                    h = image[b, y + i - kh // 2]
                    for j in range(0, kw, 3):
                        taps = partial[job, i * kw + j : i * kw + min(j + 3, kw)]
                        add_row(taps, grad[b, y], h, left, min(left + COLUMNS, width), j - kw // 2)
    add_up(partial, out)


@njit(inline="always")
def add_row(taps, g, h, left, right, step):
    """taps[t] += sum over x in [left, right) of g[x] * h[x + step + t], where that is in the row; up to three taps.

    Where it is in the row for all three, numbers that are read once serve them all.
    """
    width, count = len(h), len(taps)
    start = max(left, -step)
    end = start + (max(0, min(right, width - step - 2) - start) // 4 * 4 if count == 3 else 0)
    for t in range(count):
        add_products(taps[t], g, h, max(left, -step - t), min(start, right, width - step - t), step + t)
        add_products(taps[t], g, h, end, min(right, width - step - t), step + t)
    for x in range(start, end, 4):
        g0, g1, g2, g3 = g[x], g[x + 1], g[x + 2], g[x + 3]
        h0, h1, h2, h3 = h[x + step], h[x + step + 1], h[x + step + 2], h[x + step + 3]
        h4, h5 = h[x + step + 4], h[x + step + 5]
        t0, t1, t2 = taps[0], taps[1], taps[2]
        for c in range(taps.shape[1]):
            t0[c] += g0[c] * h0[c] + g1[c] * h1[c] + g2[c] * h2[c] + g3[c] * h3[c]
            t1[c] += g0[c] * h1[c] + g1[c] * h2[c] + g2[c] * h3[c] + g3[c] * h4[c]
            t2[c] += g0[c] * h2[c] + g1[c] * h3[c] + g2[c] * h4[c] + g3[c] * h5[c]


@njit(inline="always")
def add_products(total, g, h, x, last, step):
    """total += sum of g[x] * h[x + step] up to the last x, four at a time as in correlate."""
    channels = total.size
    while x + 3 < last:
        g0, g1, g2, g3 = g[x], g[x + 1], g[x + 2], g[x + 3]
        h0, h1, h2, h3 = h[x + step], h[x + step + 1], h[x + step + 2], h[x + step + 3]
        for c in range(channels):
            total[c] += g0[c] * h0[c] + g1[c] * h1[c] + g2[c] * h2[c] + g3[c] * h3[c]
        x += 4
    while x < last:
        g0, h0 = g[x], h[x + step]
        for c in range(channels):
            total[c] += g0[c] * h0[c]
        x += 1


@njit(parallel=True)
def add_up(partial, out):
    """out = sum of partial [chunks, taps, C] over the chunks, in order."""
    chunks, taps, channels = partial.shape
    for tap in prange(taps):
        out[tap] = 0
        for chunk in range(chunks):
            for c in range(channels):
                out[tap, c] += partial[chunk, tap, c]
