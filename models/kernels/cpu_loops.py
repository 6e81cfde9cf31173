"""The loops of models/kernels/cpu.py. Imported only if numba is installed.

Indices are unsigned where it matters: numba tests signed ones for being negative.
"""

import math

import numpy as np
from numba import njit, prange

u64 = np.uint64
ONE, TWO, THREE, FOUR = u64(1), u64(2), u64(3), u64(4)
CHUNK = u64(512)  # points that one thread takes at a time; the order of sums depends on it, not on the threads
# One rounding per multiply-add, and sums in any order. Unlike fastmath=True it is right for NaN and infinity.
MULTIPLY_ADD = {"contract", "reassoc"}


def compiled(**options):
    """njit on all cores, cached on disk (NUMBA_CACHE_DIR, beside this file, or the user's cache folder)."""

    def decorate(function):
        try:
            return njit(parallel=True, nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it may write to
            return njit(parallel=True, nogil=True, **options)(function)

    return decorate


@compiled()
def count_neighbours(index, table, kernel_size, start):
    """start[p + 1] = number of points in the window of point p; see list_neighbours."""
    (batch, points), (kh, kw) = index.shape, kernel_size
    width = table.shape[2] - kw + 1
    for p in prange(batch * points):
        image, place = divmod(np.int64(p), points)
        row, column = divmod(index[image, place], width)
        for i in range(kh):
            for j in range(kw):
                start[p + 1] += table[image, row + i, column + j] >= 0


@compiled()
def list_neighbours(index, table, kernel_size, start, near, tap):
    """near and tap [start[p] ... start[p + 1] - 1]: the points in the window of point p, and their taps, in raster
    order.

    index int64 [B, L]; table int32 [B, H + kh - 1, W + kw - 1], the place of each pixel, or -1 for absent pixels and
    for the margin.
    """
    (batch, points), (kh, kw) = index.shape, kernel_size
    width = table.shape[2] - kw + 1
    for p in prange(batch * points):
        image, place = divmod(np.int64(p), points)
        row, column = divmod(index[image, place], width)
        pair, last = start[p], start[p + 1]
        for i in range(kh):
            for j in range(kw):
                if pair == last:  # further entries belong to the next point
                    break
                found = table[image, row + i, column + j]
                near[u64(pair)] = image * points + found  # written even if absent: a branch would be mispredicted
                tap[u64(pair)] = i * kw + j
                pair += found >= 0


@compiled(fastmath=MULTIPLY_ADD, error_model="numpy")
def neighbour_sum(features, weight, start, near, tap, out):
    """out[p] = sum over the neighbours of p of weight[tap] * features[near]: [N, C] from weight [taps, C]."""
    points, channels = u64(features.shape[0]), u64(features.shape[1])
    for chunk in prange((points + CHUNK - ONE) // CHUNK):
        first = u64(chunk) * CHUNK
        for p in range(first, min(points, first + CHUNK)):
            for c in range(channels):
                out[p, c] = 0
            n, last = u64(start[p]), u64(start[p + ONE])
            while n + THREE < last:  # four at a time: reading and writing the sum costs as much as a term
                t0, t1, t2, t3 = u64(tap[n]), u64(tap[n + ONE]), u64(tap[n + TWO]), u64(tap[n + THREE])
                q0, q1, q2, q3 = u64(near[n]), u64(near[n + ONE]), u64(near[n + TWO]), u64(near[n + THREE])
                for c in range(channels):
                    out[p, c] += (weight[t0, c] * features[q0, c] + weight[t1, c] * features[q1, c]
                                  + weight[t2, c] * features[q2, c] + weight[t3, c] * features[q3, c])
                n += FOUR
            while n < last:
                t0, q0 = u64(tap[n]), u64(near[n])
                for c in range(channels):
                    out[p, c] += weight[t0, c] * features[q0, c]
                n += ONE


@compiled(fastmath=MULTIPLY_ADD, error_model="numpy")
def weight_gradient(features, grad, start, near, tap, out):
    """out[t] = sum over the pairs (p, near) with tap t of features[near] * grad[p]; out [taps, C].

    Each chunk of points has its own sum, and these are added in order.
    """
    points, channels, taps = u64(features.shape[0]), u64(features.shape[1]), u64(out.shape[0])
    chunks = (points + CHUNK - ONE) // CHUNK
    partial = np.zeros((chunks, taps, channels), out.dtype)
    for job in prange(chunks):
        chunk = u64(job)
        first = chunk * CHUNK
        for p in range(first, min(points, first + CHUNK)):
            for n in range(u64(start[p]), u64(start[p + ONE])):
                t, q = u64(tap[n]), u64(near[n])
                for c in range(channels):
                    partial[chunk, t, c] += grad[p, c] * features[q, c]
    for t in prange(taps):
        for c in range(channels):
            total = partial[0, t, c]
            for chunk in range(1, chunks):
                total += partial[chunk, t, c]
            out[t, c] = total


@njit(inline="always")
def insert(squared, pixel, found, distance, candidate):
    """Insert a candidate in lists sorted by distance, then by pixel; returns the new length, at most their size."""
    slot = found
    while slot > 0 and distance <= squared[slot - 1] and (distance < squared[slot - 1] or candidate < pixel[slot - 1]):
        slot -= 1
    if slot == squared.size:
        return found
    for later in range(min(found, squared.size - 1), slot, -1):
        squared[later], pixel[later] = squared[later - 1], pixel[later - 1]
    squared[slot], pixel[slot] = distance, candidate
    return min(found + 1, squared.size)


@compiled()  # distances are compared exactly: no fastmath
def nearest(table, height, width, grid_size, k, place, squared_distance):
    """The nearest present pixels of every node, in growing rings around the pixel that holds it.

    table              int32 [B, H * W], the place of each pixel or -1
    place              int64 [B, G², slots], squared_distance float32, likewise; both are written for the k nearest and
                       for those exactly as far as the k-th
    Distances are integers, in units of (g / (2 H W G))² with g = gcd(H, W).
    """
    batch, nodes, slots = place.shape
    common = math.gcd(height, width)
    row_unit, column_unit = width // common, height // common
    unit = (common / (2.0 * height * width * grid_size)) ** 2
    for job in prange(batch * grid_size):
        image, i = divmod(np.int64(job), grid_size)
        squared, pixel = np.empty(slots, np.int64), np.empty(slots, np.int64)
        middle = (2 * i + 1) * height // (2 * grid_size)
        for j in range(grid_size):
            centre = (2 * j + 1) * width // (2 * grid_size)
            found = 0
            for ring in range(max(height, width)):
                if found >= k:  # no pixel of this ring or beyond is nearer than the nearest of its four sides
                    up = row_unit * abs((2 * (middle - ring) + 1) * grid_size - (2 * i + 1) * height)
                    down = row_unit * abs((2 * (middle + ring) + 1) * grid_size - (2 * i + 1) * height)
                    left = column_unit * abs((2 * (centre - ring) + 1) * grid_size - (2 * j + 1) * width)
                    right = column_unit * abs((2 * (centre + ring) + 1) * grid_size - (2 * j + 1) * width)
                    if min(min(up, down), min(left, right)) ** 2 > squared[k - 1]:
                        break
                for row in range(max(middle - ring, 0), min(middle + ring + 1, height)):
                    step = 1 if abs(row - middle) == ring else 2 * ring  # a whole row of the ring, or its two ends
                    from_row = (row_unit * ((2 * row + 1) * grid_size - (2 * i + 1) * height)) ** 2
                    for column in range(centre - ring, centre + ring + 1, step):
                        if 0 <= column < width and table[image, row * width + column] >= 0:
                            from_column = column_unit * ((2 * column + 1) * grid_size - (2 * j + 1) * width)
                            found = insert(squared, pixel, found, from_row + from_column**2, row * width + column)
            node = i * grid_size + j
            for slot in range(found):
                if slot < k or squared[slot] == squared[k - 1]:
                    place[image, node, slot] = table[image, pixel[slot]]
                    squared_distance[image, node, slot] = squared[slot] * unit
