"""The search of the pixels nearest to the nodes of a grid."""

import math

import numpy as np
from numba import njit, prange

from models.loops.common import array, compiled


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
def search_rows(table, grid_size, i, j, unit, place, squared_distance):
    """The nearest pixels of node (i, j), for the few nodes with none close by: whole rows, from the node outwards."""
    height, width = table.shape
    common = math.gcd(height, width)
    best = np.full(place.size, np.inf)
    pixel = np.full(place.size, height * width)
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
            if table[row, column] >= 0:
                offset = (height // common) * ((2 * column + 1) * grid_size - (2 * j + 1) * width)
                squared = from_row + float(offset) ** 2
                if squared <= best[-1]:
                    insert(best, pixel, squared, row * width + column)
    for slot in range(place.size):
        place[slot] = table[pixel[slot] // width, pixel[slot] % width]
        squared_distance[slot] = best[slot] * unit


@compiled()  # exact comparison of distances: no fastmath
def nearest(
    table, start, phase, order, place, distance, squared_distance, batch, height, width, grid_size, k, lists, count,
    reach_rows, reach_columns, unit,
):
    """The k nearest present pixels of every node of a grid; see models/nearest.py. Tensors come as their addresses.

    table               int32 [batch, height, width], Coordinates.table
    start, phase        int64 [2, grid_size] of _Offsets, as its reach and unit are
    order, distance     int64 and float32 [lists, count] of _Offsets
    place               int64 [batch, grid_size², k], written
    squared_distance    float32 [batch, grid_size², k], written
    """
    table = array(table, (batch, height, width), np.int32(0))
    start, phase = array(start, (2, grid_size), np.int64(0)), array(phase, (2, grid_size), np.int64(0))
    # flat from here on, for one index is found faster than three
    order, distance = array(order, lists * count, np.int64(0)), array(distance, lists * count, np.float32(0))
    size = batch * grid_size * grid_size * k
    place, squared_distance = array(place, size, np.int64(0)), array(squared_distance, size, np.float32(0))
    padded = np.empty((batch, height + 2 * reach_rows, width + 2 * reach_columns), np.int32)
    for image in prange(batch):
        padded[image] = -1
        for row in range(height):
            padded[image, row + reach_rows, reach_columns : reach_columns + width] = table[image, row]
    stride = padded[0].size
    padded = padded.reshape(-1)

    for line in prange(batch * grid_size):
        image, i = divmod(np.int64(line), grid_size)  # prange counts in unsigned: differences would become floats
        for j in range(grid_size):
            first = image * stride + start[0, i] + start[1, j]
            entry = (phase[0, i] + phase[1, j]) * count
            slot = (np.int64(line) * grid_size + j) * k
            found = 0
            for n in range(entry, entry + count):
                present = padded[np.uint64(first + order[np.uint64(n)])]  # unsigned: no index counts from the end
                place[np.uint64(slot + found)] = present  # even if absent, for a branch would be hard to predict
                squared_distance[np.uint64(slot + found)] = distance[np.uint64(n)]
                found += present >= 0
                if found == k:
                    break
            if found < k:
                node = slice(slot, slot + k)
                search_rows(table[image], grid_size, i, j, unit, place[node], squared_distance[node])
