"""Interpolation between points and a grid, one node and one pixel at a time, in exact arithmetic where ties matter."""

from fractions import Fraction

import numpy as np


def nearest(pixels, size, grid_size, k):
    """For every node in raster order, the k nearest pixels as (squared distance, raster index, place), sorted."""
    height, width = size
    found = []
    for i in range(grid_size):
        for j in range(grid_size):
            y, x = Fraction(2 * i + 1, 2 * grid_size), Fraction(2 * j + 1, 2 * grid_size)
            candidates = []
            for place, pixel in enumerate(pixels):
                row, column = divmod(pixel, width)
                dy, dx = y - Fraction(2 * row + 1, 2 * height), x - Fraction(2 * column + 1, 2 * width)
                candidates.append((dy * dy + dx * dx, pixel, place))
            found.append(sorted(candidates)[:k])
    return found


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
