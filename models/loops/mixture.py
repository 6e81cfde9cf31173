"""Weighted sums of rows, as models/interpolation.py needs them for its gradients."""

from numba import prange

from models.loops.common import compiled, u64

ONE = u64(1)
CHUNK = u64(256)  # sums that one thread takes at a time


@compiled()
def transpose(place, weight, start, which, factor):
    """List the sums that each row takes part in, in order.

    place int64 and weight float32 [sums, k]: the rows of each sum. Written: start int64 [rows + 1], which int64 and
    factor float32 [sums * k]; row r is in the sums which[start[r]:start[r + 1]], with these factors.
    """
    sums, k = place.shape
    start[:] = 0
    for m in range(sums):
        for j in range(k):
            start[place[m, j] + 1] += 1
    for row in range(start.size - 1):
        start[row + 1] += start[row]
    free = start.copy()
    for m in range(sums):
        for j in range(k):
            row = place[m, j]
            which[free[row]] = m
            factor[free[row]] = weight[m, j]
            free[row] += 1


@compiled(fastmath={"contract"})
def gather(start, which, factor, values, out):
    """out[r] = sum over n in start[r] ... start[r + 1] - 1 of factor[n] values[which[n]]; values and out [., C]."""
    rows, channels = u64(out.shape[0]), u64(out.shape[1])  # whole arrays, unsigned: see models/loops/sparse_conv.py
    for chunk in prange((rows + CHUNK - ONE) // CHUNK):
        first = u64(chunk) * CHUNK
        for r in range(first, min(rows, first + CHUNK)):
            for c in range(channels):
                out[r, c] = 0
            for n in range(u64(start[r]), u64(start[r + ONE])):
                value, f = u64(which[n]), factor[n]
                for c in range(channels):
                    out[r, c] += f * values[value, c]
