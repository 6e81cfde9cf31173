"""Between the sampled points and the regular grid of the U-Net, in both directions.

Each is a weighted sum of a few rows of features; places and weights depend on the coordinates alone and are
computed once for them.
"""

import functools

import torch
import torch.nn.functional as F

from models import compiled, tracing
from models.derivatives import first_order_only
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
    return knn_mixture(coords, grid_size, k)(features).unflatten(1, (grid_size, grid_size)).permute(0, 3, 1, 2)


def grid_to_points(grid, coords):
    """Bilinear interpolation of a square grid at the coordinates, clamped at the border (METHOD 4, step 5).

    grid [B, C, G, G] -> [B, L, C]; what F.grid_sample computes with align_corners=False and padding_mode="border".
    """
    size = grid.shape[-1]
    mixture = coords.cached(("grid_to_points", size), lambda: _bilinear_mixture(coords, size))
    return mixture(grid.flatten(2).transpose(1, 2))


def knn_mixture(coords, grid_size, k):
    """The points that each node of knn_to_grid is a mean of, and their weights, as a Mixture."""
    return coords.cached(("knn_to_grid", grid_size, k), lambda: _knn_mixture(coords, grid_size, k))


@tracing.untraced  # what follows from the coordinates is looked up or computed, and never traced
def _knn_mixture(coords, grid_size, k):
    place, squared_distance = nearest_pixels(coords, grid_size, k)
    weight = 1 / squared_distance.clamp(min=TINY)
    return Mixture(place, weight / weight.sum(dim=-1, keepdim=True), coords.num_points)


def _bilinear_mixture(coords, size):
    position = (coords.positions * size - 0.5).clamp(0, size - 1)
    low = position.floor()
    x1, y1 = (position - low).unbind(-1)  # share of the right and of the lower neighbour
    left, top = low.long().unbind(-1)
    right, bottom = (left + 1).clamp(max=size - 1), (top + 1).clamp(max=size - 1)
    place = torch.stack([top * size + left, top * size + right, bottom * size + left, bottom * size + right], dim=-1)
    weight = torch.stack([(1 - y1) * (1 - x1), (1 - y1) * x1, y1 * (1 - x1), y1 * x1], dim=-1)
    return Mixture(place, weight, size * size)


class Mixture:
    """Weighted sums of K of each image's `count` rows: place int64 and weight float32 [B, M, K].

    Called with features [B, count, C] it returns [B, M, C], and never holds [B, M, K, C].
    """

    def __init__(self, place, weight, count):
        self.images, self.count = len(place), count
        first = count * torch.arange(len(place), device=place.device)
        self.place = (place + first[:, None, None]).flatten(0, 1)  # among the rows of the whole batch
        self.weight = weight.flatten(0, 1)

    def __call__(self, features):
        rows = features.flatten(0, 1)
        # On a CPU PyTorch's gradient of embedding_bag, used without numba, takes more time than all of the rest.
        by_loops = rows.device.type == "cpu" and compiled.is_available()
        mixed = _MixRows.apply(rows, self) if by_loops else self.mix(rows)
        return mixed.unflatten(0, (self.images, -1))

    def mix(self, rows):
        return F.embedding_bag(self.place, rows, mode="sum", per_sample_weights=self.weight.to(rows.dtype))

    @functools.cached_property
    def transposed(self):
        """The sums of each row, as models/loops/mixture.py lists them."""
        pairs = self.place.numel()
        start = torch.empty(self.images * self.count + 1, dtype=torch.int64)
        which, factor = torch.empty(pairs, dtype=torch.int64), torch.empty(pairs, dtype=self.weight.dtype)
        compiled.run("mixture.transpose", self.place, self.weight, start, which, factor)
        return start, which, factor


class _MixRows(torch.autograd.Function):
    """Mixture.mix, with a gradient that goes through the rows, in the order of the sums that each takes part in."""

    @staticmethod
    def forward(ctx, rows, mixture):
        ctx.mixture = mixture
        return mixture.mix(rows)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        wide = (grad if grad.dtype == torch.float64 else grad.float()).contiguous()
        out = wide.new_empty(ctx.mixture.images * ctx.mixture.count, wide.shape[1])
        compiled.run("mixture.gather", *ctx.mixture.transposed, wide, out)
        return out.to(grad.dtype), None
