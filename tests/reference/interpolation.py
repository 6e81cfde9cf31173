"""Interpolation between points and a grid, one node and one pixel at a time, in exact arithmetic where ties matter."""

from fractions import Fraction

import numpy as np


def nearest(pixels, size, grid_size, k):
    """For every node in raster order, sorted (squared distance, raster index, place) of the k nearest pixels and of all
    exactly as far as the k-th."""
    rows, columns = (squared_offsets(length, grid_size) for length in size)
    found = []
    for i in range(grid_size):
        for j in range(grid_size):
            candidates = sorted((rows[i][pixel // size[1]] + columns[j][pixel % size[1]], pixel, place)
                                for place, pixel in enumerate(pixels))
            found.append([one for one in candidates if one[0] <= candidates[k - 1][0]])
    return found


def squared_offsets(length, grid_size):
    """Squared offsets of pixel centres from node centres along an axis, Fractions [grid_size][length]."""
    return [[(Fraction(2 * node + 1, 2 * grid_size) - Fraction(2 * pixel + 1, 2 * length)) ** 2
             for pixel in range(length)] for node in range(grid_size)]


def knn_to_grid(features, pixels, size, grid_size, k):
    """Inverse-squared-distance weighted means for one image: features [L, C], pixels [L] -> float64 [C, G, G]."""
    nodes = []
    for neighbours in nearest(pixels, size, grid_size, k):
        if neighbours[0][0] == 0:
            nodes.append(features[neighbours[0][2]])
        else:
            weights = np.array([1 / float(distance) for distance, _, _ in neighbours])
            rows = features[[place for _, _, place in neighbours]]
            nodes.append((weights[:, None] * rows).sum(0) / weights.sum())
    return np.stack(nodes).reshape(grid_size, grid_size, -1).transpose(2, 0, 1)


def grid_to_points(grid, pixels, size):
    """Bilinear interpolation of one grid [C, G, G] at pixels [L], clamped at the border -> float64 [L, C]."""
    (height, width), last = size, grid.shape[-1] - 1
    out = []
    for pixel in pixels:
        row, column = divmod(pixel, width)
        y = min(max((row + 0.5) / height * (last + 1) - 0.5, 0), last)
        x = min(max((column + 0.5) / width * (last + 1) - 0.5, 0), last)
        value = 0
        for i in range(last + 1):
            for j in range(last + 1):
                value = value + max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * grid[:, i, j]
        out.append(value)
    return np.stack(out)
