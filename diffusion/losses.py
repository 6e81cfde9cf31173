"""Losses between predictions and targets at the sampled points, each a mean per sample, float32 [B]."""

import math

import torch

SMALLEST_GRID = 8


def mean_per_sample(x):
    """Mean over all axes but the first, [B]."""
    return x.flatten(1).mean(dim=1)


def prediction_loss(loss_type, prediction, target):
    """Loss of the network's prediction, [B]; both arguments [B, L, C] or [B, Z] (docs/method.md, 3.4).

    l1 is the mean absolute error; mse and rescaled_mse are the mean squared error. The latter two differ only in the
    weight of the variational bound (vlb_weight).
    """
    error = prediction - target
    return mean_per_sample(error.abs() if loss_type == "l1" else error.square())


def vlb_weight(loss_type, steps):
    """Weight of one term of the variational bound relative to the loss of the prediction (docs/method.md, 3.7).

    For rescaled_mse it is steps / 1000, which gives L_simple + 0.001 L_vlb (Nichol and Dhariwal 2021, eq. 16) for any
    number of steps; otherwise it is 1.
    """
    return steps / 1000 if loss_type == "rescaled_mse" else 1.0


def gaussian_kl(mean_difference, log_variance_q, log_variance_p):
    """KL(q || p) of two normal distributions per element, in bits; the arguments broadcast (docs/method.md, 3.7)."""
    nats = 0.5 * (
        log_variance_p
        - log_variance_q
        - 1
        + torch.exp(log_variance_q - log_variance_p)
        + mean_difference.square() * torch.exp(-log_variance_p)
    )
    return nats / math.log(2)


def grid_sizes(max_size):
    """Grids of the multiscale loss: max_size, max_size // 2, ... down to SMALLEST_GRID."""
    sizes = []
    while max_size >= SMALLEST_GRID:
        sizes.append(max_size)
        max_size //= 2
    return sizes


def multiscale_loss(prediction, target, coords, max_size):
    """Squared errors of cell averages on coarser and coarser grids, [B], to be added to the loss of the points.

        sum over s of (R / s) · mean over non-empty cells of (average error in the cell)²    (docs/method.md, 3.8)

    R = sqrt(H W), so that a grid of s×s cells has weight 1 / s relative to the points, a grid of R×R (simple diffusion,
    Hoogeboom et al. 2023). The average over the sampled points in a cell is a Monte Carlo estimate of average pooling.
    prediction, target  [B, L, C] at coords, any Coordinates
    """
    error = prediction - target
    resolution = math.sqrt(coords.size[0] * coords.size[1])
    return sum(resolution / size * _cell_loss(error, coords, size) for size in grid_sizes(max_size))


def _cell_loss(error, coords, size):
    """Mean over non-empty cells and channels of the squared average error, [B]."""
    cell, count = coords.cached(("cells", size), lambda: _cells(coords, size))
    total = error.new_zeros(coords.batch, size * size, error.shape[2])
    total = total.scatter_add(1, cell[:, :, None].expand_as(error), error)
    average = total / count.clamp(min=1)[:, :, None]
    return average.square().mean(dim=2).sum(dim=1) / (count > 0).sum(dim=1)


def _cells(coords, size):
    """Cell of every point, int64 [B, L], and number of points in every cell, float32 [B, size²]."""
    height, width = coords.size
    row, column = coords.index // width, coords.index % width
    cell = (row * size // height) * size + column * size // width
    count = torch.zeros(coords.batch, size * size, device=coords.device)
    return cell, count.scatter_add(1, cell, torch.ones_like(cell, dtype=count.dtype))
