"""The search of the pixels nearest to the nodes of a grid."""

import math

import numpy as np
from numba import njit, prange

from models.loops.common import array, compiled, lowest_bit, u32, u64

BAND = 16  # rows of nodes that one thread takes at a time, with a copy of the pixels around them
LOOKS = 32  # pixels that the nodes of a row look at before they take theirs, one bit each
AT_ONCE = 4  # of them in a turn of the loop, which `look` writes out; the last few of a list are not looked at
LINE = 16  # numbers of four bytes in a line of the cache


@njit(inline="always")
def insert(best, pixel, squared, candidate):
    """Insert a candidate in lists kept in order of distance, then of raster index; the last entry drops out."""
    slot = best.size
    while slot > 0 and (squared < best[slot - 1] or (squared == best[slot - 1] and candidate < pixel[slot - 1])):
        slot -= 1
    for later in range(best.size - 1, slot, -1):
        best[later] = best[later - 1]
        pixel[later] = pixel[later - 1]
    if slot < best.size:
        best[slot] = squared
        pixel[slot] = candidate


@njit
def search_rows(table, image, height, width, grid_size, i, j, unit, place, squared_distance, slot, k):
    """The nearest pixels of node (i, j), for the few nodes with none close by: whole rows, from the node outwards."""
    common = math.gcd(height, width)
    best = np.full(k, np.inf)
    pixel = np.full(k, height * width)
    middle = (2 * i + 1) * height // (2 * grid_size)
    for step in range(2 * height):
        row = middle + ((step + 1) // 2 if step % 2 else -(step // 2))
        if row < 0 or row >= height:
            continue
        offset = (width // common) * ((2 * row + 1) * grid_size - (2 * i + 1) * height)
        from_row = float(offset) ** 2
        if from_row > best[-1]:
            continue
        for column in range(width):
            if table[(image * height + row) * width + column] >= 0:
                offset = (height // common) * ((2 * column + 1) * grid_size - (2 * j + 1) * width)
                squared = from_row + float(offset) ** 2
                if squared <= best[-1]:
                    insert(best, pixel, squared, row * width + column)
    for number in range(k):
        place[slot + number] = table[image * height * width + pixel[number]]
        squared_distance[slot + number] = best[number] * unit


@njit(inline="always")
def arrange(table, image, height, width, reach_rows, reach_columns, step, apart, padded, copy, top, bottom):
    """Rows top to bottom of an image as models.nearest._padded arranges them, at padded[copy:]."""
    for n in range((bottom - top) * step * apart):
        padded[u64(copy + n)] = -1
    for row in range(max(top, reach_rows), min(bottom, reach_rows + height)):
        line = (image * height + row - reach_rows) * width
        for column in range(step):
            position = column + reach_columns
            target = copy + ((row - top) * step + position % step) * apart + position // step
            for n in range((width - column + step - 1) // step):
                padded[u64(target + n)] = table[u64(line + column + n * step)]


@njit(inline="always")
def look(padded, row, order, begin, end, seen, node, together):
    """Which of the pixels begin to end of a list, a multiple of four, are present around each node: bits of `seen`."""
    for m in range(together):
        seen[u64(node + m)] = 0
    for n in range(begin, end, AT_ONCE):
        a, b = row + order[u64(n)], row + order[u64(n + 1)]
        c, d = row + order[u64(n + 2)], row + order[u64(n + 3)]
        bit = u32(n - begin)
        for m in range(together):
            bits = u32(padded[u64(a + m)] >= 0) | u32(padded[u64(b + m)] >= 0) << u32(1)
            bits |= u32(padded[u64(c + m)] >= 0) << u32(2) | u32(padded[u64(d + m)] >= 0) << u32(3)
            seen[u64(node + m)] |= bits << bit


@compiled()  # exact comparison of distances: no fastmath
def nearest(
    table, place, squared_distance, batch, start, first, order, distance, height, width, grid_size, k, lists, count,
    reach_rows, reach_columns, step, apart, groups, unit,
):
    """The k nearest present pixels of every node of a grid; see models/nearest.py. Tensors come as their addresses.

    table               int32 [batch, height * width], Coordinates.table
    place               int64 [batch, grid_size², k], written
    squared_distance    float32 [batch, grid_size², k], written
    start ...           _Offsets.arguments

    All nodes of a row that share a list go down that list side by side, and note in a bit of each whether the pixel is
    present. So no branch depends on a pixel, and only then does each node take its pixels from the bits that are set.
    """
    table = array(table, batch * height * width, np.int32(0))
    start, first = array(start, grid_size, np.int64(0)), array(first, grid_size, np.int64(0))
    order, distance = array(order, lists * count, np.int64(0)), array(distance, lists * count, np.float32(0))
    size = batch * grid_size * grid_size * k
    place, squared_distance = array(place, size, np.int64(0)), array(squared_distance, size, np.float32(0))

    looks = count // AT_ONCE * AT_ONCE
    bands, together = (grid_size + BAND - 1) // BAND, grid_size // groups
    stride = step * apart
    tall = 0
    for begin in range(0, grid_size, BAND):
        tall = max(tall, (start[min(begin + BAND, grid_size) - 1] - start[begin]) // stride + 1)
    band_size = (tall + 2 * reach_rows) * stride
    padded = np.empty(batch * bands * band_size, np.int32)
    scratch = batch * bands * (together + LINE)  # a line between the numbers of two threads, which they would fight for
    seen, found = np.empty(scratch, np.uint32), np.empty(scratch, np.int32)

    for band in prange(batch * bands):
        image, begin = np.int64(band) // bands, np.int64(band) % bands * BAND  # prange counts in unsigned numbers
        end = min(begin + BAND, grid_size)
        top = start[begin] // stride - reach_rows  # the rows of the padded image that are copied
        bottom = start[end - 1] // stride + reach_rows + 1
        copy, node = np.int64(band) * band_size, np.int64(band) * (together + LINE)
        arrange(table, image, height, width, reach_rows, reach_columns, step, apart, padded, copy, top, bottom)
        for i in range(begin, end):
            row = copy - top * stride + start[i]
            for group in range(groups):
                listed = (first[i] + group) * count
                for m in range(together):
                    found[u64(node + m)] = 0
                for n in range(listed, listed + looks, LOOKS):
                    look(padded, row, order, n, min(n + LOOKS, listed + looks), seen, node, together)
                    waiting = False
                    for m in range(together):
                        slot = ((image * grid_size + i) * grid_size + m * groups + group) * k
                        left, taken = seen[u64(node + m)], np.int64(found[u64(node + m)])
                        while taken < k and left:
                            nearest_left = u64(n + lowest_bit(left))
                            place[u64(slot + taken)] = padded[u64(row + order[nearest_left] + m)]
                            squared_distance[u64(slot + taken)] = distance[nearest_left]
                            left &= left - u32(1)
                            taken += 1
                        found[u64(node + m)] = taken
                        waiting |= taken < k
                    if not waiting:
                        break
                for m in range(together):
                    if found[u64(node + m)] < k:
                        j = m * groups + group
                        slot = ((image * grid_size + i) * grid_size + j) * k
                        search_rows(
                            table, image, height, width, grid_size, i, j, unit, place, squared_distance, slot, k
                        )
