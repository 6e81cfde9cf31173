"""Losses between predictions and targets at the sampled points, each a mean per sample, float32 [B]."""

import math

import torch

from utils.errors import UserError

LOSS_TYPES = ("mse", "l1", "rescaled_mse")
SMALLEST_GRID = 8


def mean_per_sample(x):
    """Mean of everything but the first axis, [B]."""
    return x.flatten(1).mean(dim=1)


def prediction_loss(loss_type, prediction, target):
    """Loss of the network's prediction, [B]; both arguments [B, L, C] or [B, Z].

    mse and rescaled_mse are the mean squared error, l1 the mean absolute error. The two squared losses differ in the
    weight of the variational bound that learned variances add (vlb_weight) and in nothing else.
    """
    error = prediction - target
    return mean_per_sample(error.abs() if loss_type == "l1" else error.square())


def check_loss_type(loss_type):
    """Raises UserError unless diffusion.loss_type is known."""
    if loss_type not in LOSS_TYPES:
        raise UserError(f"diffusion.loss_type={loss_type!r} is unknown; use one of {', '.join(LOSS_TYPES)}")


def vlb_weight(loss_type, steps):
    """Weight of one term of the variational bound beside the loss of the prediction.

    rescaled_mse weights it steps / 1000, which makes the sum L_simple + 0.001 L_vlb (Nichol and Dhariwal 2021, eq. 16)
    whatever the number of steps; the other losses add the term as it is, which is the same for 1000 steps.
    """
    return steps / 1000 if loss_type == "rescaled_mse" else 1.0


def gaussian_kl(mean_difference, log_variance_q, log_variance_p):
    """KL(q || p) of two normal distributions per element, in bits; the arguments broadcast."""
    nats = 0.5 * (
        log_variance_p
        - log_variance_q
        - 1
        + torch.exp(log_variance_q - log_variance_p)
        + mean_difference.square() * torch.exp(-log_variance_p)
    )
    return nats / math.log(2)


def grid_sizes(max_size):
    """Grids of the multiscale loss: max_size, max_size // 2, ... down to 8. Raises UserError if there is none."""
    if max_size < SMALLEST_GRID:
        raise UserError(f"diffusion.multiscale_max_img_size={max_size} is too small; use {SMALLEST_GRID} or more")
    sizes = []
    while max_size >= SMALLEST_GRID:
        sizes.append(max_size)
        max_size //= 2
    return sizes


def multiscale_loss(prediction, target, coords, max_size):
    """Squared errors of cell averages on coarser and coarser grids, [B], to be added to the loss of the points.

    A grid of s×s cells enters with the weight R / s, R = sqrt(H W): 1 / s relative to the points, which are a grid of
    R cells a side (simple diffusion, Hoogeboom et al. 2023). A cell's average is over the sampled points in it, a Monte
    Carlo estimate of average pooling, and empty cells do not count.
    prediction, target  [B, L, C] at coords, any Coordinates
    """
    error = prediction - target
    resolution = math.sqrt(coords.size[0] * coords.size[1])
    return sum(resolution / size * _cell_loss(error, coords, size) for size in grid_sizes(max_size))


def _cell_loss(error, coords, size):
    """Mean over the cells that hold a point, and channels, of the squared average error, [B]."""
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
