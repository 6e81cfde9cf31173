"""The search of models/nearest.py as one Triton kernel, so that the host never waits for what a GPU has found.

Imported only where Triton is installed.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(2**62)  # further than any pixel: squared distances are integers below 2^53


@triton.jit
def nearest(
    padded, table, start, first, order, distance, place, squared_distance, nodes, padded_size, height, width, count,
    groups, row_unit, column_unit, scale, G: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The K nearest present pixels of a block of nodes; models.nearest._Offsets explains `start` ... `distance`.

    padded            int32 [B, padded_size], the table as models.nearest._padded arranges it
    table             int32 [B, H, W]
    place             int64 [nodes, K], nodes = B · G · G, written; squared_distance float32, likewise
    row_unit ...      W / g, H / g and 2 H W G / g with g = gcd(H, W), for the integers that distances are
    """
    node = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = node < nodes
    image, i, j = node // (G * G), node // G % G, node % G
    pixel = image.to(tl.int64) * padded_size
    pixel += tl.load(start + i, mask=exists, other=0) + j // groups
    listed = (tl.load(first + i, mask=exists, other=0) + j % groups) * count
    found = tl.where(exists, 0, K)
    step = 0
    while (step < count) & (tl.min(found) < K):  # as far down the list as the slowest node has to go
        looking = found < K
        seen = tl.load(padded + pixel + tl.load(order + listed + step, mask=looking, other=0), mask=looking, other=-1)
        slot = node.to(tl.int64) * K + found
        tl.store(place + slot, seen.to(tl.int64), mask=seen >= 0)
        tl.store(squared_distance + slot, tl.load(distance + listed + step, mask=looking, other=0), mask=seen >= 0)
        found += seen >= 0
        step += 1

    if tl.min(found) < K:  # a few nodes, far from most pixels, look at every one
        tl.debug_barrier()  # what other threads have written for them is to be overwritten
        for lane in range(BLOCK):
            if tl.min(tl.where(tl.arange(0, BLOCK) == lane, found, K)) < K:
                one = (tl.program_id(0) * BLOCK + lane).to(tl.int64)
                search_all(
                    table + one // (G * G) * height * width, place + one * K, squared_distance + one * K,
                    one // G % G, one % G, height, width, row_unit, column_unit, scale, G, K, PIXELS,
                )  # fmt: skip


@triton.jit
def search_all(
    table, place, squared_distance, i, j, height, width, row_unit, column_unit, scale,
    G: tl.constexpr, K: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The K nearest of all pixels of one node: K times the nearest of those beyond the last one."""
    last, last_pixel = tl.full((), -1, tl.int64), tl.full((), -1, tl.int64)
    for slot in range(K):
        best, best_pixel = tl.full((), FAR, tl.int64), tl.full((), 0, tl.int64)
        for first in range(0, height * width, PIXELS):
            pixel = (first + tl.arange(0, PIXELS)).to(tl.int64)
            present = tl.load(table + pixel, mask=pixel < height * width, other=-1) >= 0
            from_row = row_unit * ((2 * (pixel // width) + 1) * G - (2 * i + 1) * height)
            from_column = column_unit * ((2 * (pixel % width) + 1) * G - (2 * j + 1) * width)
            squared = from_row * from_row + from_column * from_column
            beyond = (squared > last) | ((squared == last) & (pixel > last_pixel))
            squared = tl.where(present & beyond, squared, FAR)
            smallest = tl.min(squared)
            smallest_pixel = tl.min(tl.where(squared == smallest, pixel, FAR))  # of equally near ones the first
            best_pixel = tl.where(smallest < best, smallest_pixel, best_pixel)
            best = tl.minimum(smallest, best)
        tl.store(place + slot, tl.load(table + best_pixel).to(tl.int64))
        tl.store(squared_distance + slot, (best.to(tl.float64) / (scale.to(tl.float64) * scale)).to(tl.float32))
        last, last_pixel = best, best_pixel
