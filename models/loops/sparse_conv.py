"""The depthwise sparse operator; models/backends/numba.py says how the loops are used.

The loops over pairs of neighbours must spend little on a pair beside its channels. So they index whole arrays: rows
taken of them would be tested for overlap, for every pair anew. And indices are unsigned: signed ones would be tested
for being negative, as those that count from the end are.
"""

import numpy as np
from numba import njit, prange

from models.loops.common import VECTOR, compiled, u64

ONE, TWO, THREE, FOUR = u64(1), u64(2), u64(3), u64(4)

# Points that one thread takes at a time. The order of sums depends on it, never on the number of threads.
CHUNK = u64(512)
ROWS = 4  # likewise rows of an image
COLUMNS = 32  # of features and gradients, which then stay in the nearest cache
# one rounding per multiply-add and any order of four terms, but unlike fastmath=True right with NaN and infinity, which
# the trainer and the loss scaling of float16 look for
MULTIPLY_ADD = {"contract", "reassoc"}
PAIRS = {**VECTOR, "fastmath": MULTIPLY_ADD}


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
        pair, last = start[point], start[point + 1]
        for i in range(max(0, kh // 2 - row), min(kh, kh // 2 + height - row)):
            for j in range(max(0, kw // 2 - column), min(kw, kw // 2 + width - column)):
                if pair == last:  # what follows in the lists belongs to the next point
                    break
                found = table[u64(image), u64(row + i - kh // 2), u64(column + j - kw // 2)]
                near[u64(pair)] = image * points + found  # even if absent, for a branch would be hard to predict
                tap[u64(pair)] = i * kw + j
                pair += found >= 0


@compiled(**PAIRS)
def correlate(features, weight, start, near, tap, before, after, out):
    """out[p] = after[p] · sum over the neighbours of p of weight[tap] * before[near] * features[near], by channel.

    features [N, C], the points of all images; weight [kh * kw, C]; before and after [N]; out [N, C], written.
    """
    points, channels = u64(features.shape[0]), u64(features.shape[1])
    for chunk in prange((points + CHUNK - ONE) // CHUNK):
        first = u64(chunk) * CHUNK
        for p in range(first, min(points, first + CHUNK)):
            for c in range(channels):
                out[p, c] = 0
            n, last = u64(start[p]), u64(start[p + ONE])
            while n + THREE < last:  # four at a time, since reading and writing the sum costs as much as a term
                t0, t1, t2, t3 = u64(tap[n]), u64(tap[n + ONE]), u64(tap[n + TWO]), u64(tap[n + THREE])
                q0, q1, q2, q3 = u64(near[n]), u64(near[n + ONE]), u64(near[n + TWO]), u64(near[n + THREE])
                f0, f1, f2, f3 = before[q0], before[q1], before[q2], before[q3]
                for c in range(channels):
                    out[p, c] += (f0 * weight[t0, c] * features[q0, c] + f1 * weight[t1, c] * features[q1, c]
                                  + f2 * weight[t2, c] * features[q2, c] + f3 * weight[t3, c] * features[q3, c])
                n += FOUR
            while n < last:
                t0, q0 = u64(tap[n]), u64(near[n])
                f0 = before[q0]
                for c in range(channels):
                    out[p, c] += f0 * weight[t0, c] * features[q0, c]
                n += ONE
            for c in range(channels):
                out[p, c] *= after[p]


@compiled(**PAIRS)
def weight_gradient(features, grad, start, near, tap, before, after, out):
    """out[t] = sum over the pairs (p, near) with tap t of before[near] features[near] * after[p] grad[p], by channel.

    features and grad [N, C]; before and after [N]; out [kh * kw, C], written. Each chunk of points has its own sum, and
    these are added in order.
    """
    points, channels, taps = u64(features.shape[0]), u64(features.shape[1]), u64(out.shape[0])
    chunks = (points + CHUNK - ONE) // CHUNK
    partial = np.empty((chunks, taps, channels), out.dtype)
    for job in prange(chunks):
        chunk = u64(job)
        first = chunk * CHUNK
        for t in range(taps):
            for c in range(channels):
                partial[chunk, t, c] = 0
        for p in range(first, min(points, first + CHUNK)):
            for n in range(u64(start[p]), u64(start[p + ONE])):
                t, q = u64(tap[n]), u64(near[n])
                factor = before[q] * after[p]
                for c in range(channels):
                    partial[chunk, t, c] += factor * grad[p, c] * features[q, c]
    add_up(partial, out)


@compiled(**PAIRS)
def image_weight_gradient(image, grad, kernel_size, size, out):
    """As weight_gradient, where every pixel is present: image and grad [B * H * W, C], size (H, W), out [kh * kw, C].

    F.conv2d computes the other two products well, but this one in four to six times the time of the loop.
    """
    (kh, kw), (height, width) = kernel_size, size
    channels = u64(image.shape[1])
    chunks = (height + ROWS - 1) // ROWS
    jobs = len(image) // (height * width) * chunks
    partial = np.empty((jobs, kh * kw, channels), out.dtype)
    for job in prange(jobs):
        b, chunk = divmod(np.int64(job), chunks)
        for t in range(u64(kh * kw)):
            for c in range(channels):
                partial[u64(job), t, c] = 0
        for y in range(chunk * ROWS, min(height, (chunk + 1) * ROWS)):
            for left in range(0, width, COLUMNS):
                right = min(left + COLUMNS, width)
                for i in range(max(0, kh // 2 - y), min(kh, kh // 2 + height - y)):
                    g, h = (b * height + y) * width, (b * height + y + i - kh // 2) * width  # the first of their rows
                    for j in range(0, kw, 3):
                        add_row(partial, job, i * kw + j, min(3, kw - j), grad, g, image, h, left, right, width,
                                j - kw // 2)
    add_up(partial, out)


@njit(inline="always")
def add_row(partial, job, tap, taps, grad, g, image, h, left, right, width, step):
    """partial[job, tap + t] += sum over x in [left, right) of grad[g + x] * image[h + x + step + t], where that is in
    the row, for each t of up to three taps.

    Where it is in the row for all three, numbers that are read once serve them all.
    """
    start = max(left, -step)
    end = start + (max(0, min(right, width - step - 2) - start) // 4 * 4 if taps == 3 else 0)
    for t in range(taps):
        first, last = max(left, -step - t), min(right, width - step - t)
        add_products(partial, job, tap + t, grad, g, image, h + step + t, first, min(start, last))
        add_products(partial, job, tap + t, grad, g, image, h + step + t, end, last)
    channels = u64(image.shape[1])
    n, t0, t1, t2 = u64(job), u64(tap), u64(tap + 1), u64(tap + 2)
    for x in range(start, end, 4):
        g0, h0 = u64(g + x), u64(h + x + step)
        g1, g2, g3 = g0 + ONE, g0 + TWO, g0 + THREE
        h1, h2, h3, h4, h5 = h0 + ONE, h0 + TWO, h0 + THREE, h0 + FOUR, h0 + FOUR + ONE
        for c in range(channels):
            partial[n, t0, c] += (grad[g0, c] * image[h0, c] + grad[g1, c] * image[h1, c]
                                  + grad[g2, c] * image[h2, c] + grad[g3, c] * image[h3, c])
            partial[n, t1, c] += (grad[g0, c] * image[h1, c] + grad[g1, c] * image[h2, c]
                                  + grad[g2, c] * image[h3, c] + grad[g3, c] * image[h4, c])
            partial[n, t2, c] += (grad[g0, c] * image[h2, c] + grad[g1, c] * image[h3, c]
                                  + grad[g2, c] * image[h4, c] + grad[g3, c] * image[h5, c])


@njit(inline="always")
def add_products(partial, job, tap, grad, g, image, h, x, last):
    """partial[job, tap] += sum of grad[g + x] * image[h + x] up to the last x, four at a time as in correlate."""
    channels = u64(image.shape[1])
    n, t = u64(job), u64(tap)
    while x + 3 < last:
        g0, h0 = u64(g + x), u64(h + x)
        g1, g2, g3, h1, h2, h3 = g0 + ONE, g0 + TWO, g0 + THREE, h0 + ONE, h0 + TWO, h0 + THREE
        for c in range(channels):
            partial[n, t, c] += (grad[g0, c] * image[h0, c] + grad[g1, c] * image[h1, c]
                                 + grad[g2, c] * image[h2, c] + grad[g3, c] * image[h3, c])
        x += 4
    while x < last:
        g0, h0 = u64(g + x), u64(h + x)
        for c in range(channels):
            partial[n, t, c] += grad[g0, c] * image[h0, c]
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
