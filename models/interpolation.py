"""Between the sampled points and the regular grid of the U-Net, in both directions.

Each is a weighted sum of a few rows of features; places and weights depend on the coordinates alone and are
computed once for them.
"""

import torch
import torch.nn.functional as F

from models.nearest import nearest_pixels

TINY = 1e-20  # keeps the weight of a pixel that coincides with a node finite; neighbours are > 1e-10 apart


def knn_to_grid(features, coords, grid_size, k=3):
    """Inverse-squared-distance weighted mean of the k points nearest to each node of a regular grid (METHOD 4, step 3).

    features [B, L, C] -> [B, C, G, G] in channels_last memory, G = grid_size. The node in row i and column j sits at
    ((j + 0.5) / G, (i + 0.5) / G); distances are measured in [0, 1]². A point that coincides with a node takes all of
    its weight. Raises ValueError where there are fewer than k points.
    """
    if k > coords.num_points:
        raise ValueError(f"k={k} nearest points were asked for, but there are only {coords.num_points} points")
    place, weight = coords.cached(("knn_to_grid", grid_size, k), lambda: _knn_weights(coords, grid_size, k))
    return _weighted_rows(features, place, weight).unflatten(1, (grid_size, grid_size)).permute(0, 3, 1, 2)


def grid_to_points(grid, coords):
    """Bilinear interpolation of a square grid at the coordinates, clamped at the border (METHOD 4, step 5).

    grid [B, C, G, G] -> [B, L, C]; what F.grid_sample computes with align_corners=False and padding_mode="border".
    """
    size = grid.shape[-1]
    place, weight = coords.cached(("grid_to_points", size), lambda: _bilinear_weights(coords, size))
    return _weighted_rows(grid.flatten(2).transpose(1, 2), place, weight)


def _knn_weights(coords, grid_size, k):
    place, squared_distance = nearest_pixels(coords, grid_size, k)
    weight = 1 / squared_distance.clamp(min=TINY)
    return _rows(place, coords.num_points), weight / weight.sum(dim=-1, keepdim=True)


def _bilinear_weights(coords, size):
    position = (coords.positions * size - 0.5).clamp(0, size - 1)
    low = position.floor()
    x1, y1 = (position - low).unbind(-1)  # share of the right and of the lower neighbour
    left, top = low.long().unbind(-1)
    right, bottom = (left + 1).clamp(max=size - 1), (top + 1).clamp(max=size - 1)
    place = torch.stack([top * size + left, top * size + right, bottom * size + left, bottom * size + right], dim=-1)
    weight = torch.stack([(1 - y1) * (1 - x1), (1 - y1) * x1, y1 * (1 - x1), y1 * x1], dim=-1)
    return _rows(place, size * size), weight


def _rows(place, count):
    """Places [B, M, K] in each image's `count` rows -> places among the rows of the whole batch."""
    return place + count * torch.arange(len(place), device=place.device)[:, None, None]


def _weighted_rows(features, place, weight):
    """features [B, N, C], place and weight [B, M, K] -> [B, M, C]: sums of K rows, without [B, M, K, C] in memory."""
    rows = features.flatten(0, 1)
    weight = weight.flatten(0, 1).to(rows.dtype)
    bags = F.embedding_bag(place.flatten(0, 1), rows, mode="sum", per_sample_weights=weight)
    return bags.unflatten(0, place.shape[:2])
