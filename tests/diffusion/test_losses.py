"""Loss terms against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

from data.coordinates import Coordinates
from diffusion import losses
from tests.reference import gaussian
from utils.rng import generator


def test_prediction_losses():
    prediction, target = torch.tensor([[[1.0, -2.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]])
    assert losses.prediction_loss("mse", prediction, target).tolist() == [2.5, 12.5]
    assert losses.prediction_loss("rescaled_mse", prediction, target).tolist() == [2.5, 12.5]
    assert losses.prediction_loss("l1", prediction, target).tolist() == [1.5, 3.5]


def test_only_rescaled_mse_scales_the_bound():
    assert losses.vlb_weight("rescaled_mse", 250) == 0.25
    assert losses.vlb_weight("mse", 250) == losses.vlb_weight("l1", 250) == 1
    assert losses.vlb_weight("rescaled_mse", 1000) == losses.vlb_weight("mse", 1000)


@pytest.mark.parametrize("difference, variance_q, variance_p", [(0.0, 1.0, 1.0), (0.3, 0.5, 2.0), (-1.0, 2.0, 0.7)])
def test_kl_of_gaussians_is_the_integral(difference, variance_q, variance_p):
    bits = losses.gaussian_kl(*(torch.tensor(v) for v in (difference, math.log(variance_q), math.log(variance_p))))
    nats = gaussian.kl(difference, variance_q, 0.0, variance_p)
    assert bits.item() == pytest.approx(nats / math.log(2), abs=1e-6)


def test_grids_halve_down_to_8():
    assert losses.grid_sizes(64) == [64, 32, 16, 8]
    assert losses.grid_sizes(20) == [20, 10] and losses.grid_sizes(8) == [8]


def multiscale_by_loops(error, coords, max_size):
    height, width = coords.size
    total = np.zeros(coords.batch)
    for b in range(coords.batch):
        size = max_size
        while size >= 8:
            cells = {}
            for place, pixel in enumerate(coords.index[b].tolist()):
                cell = math.floor(pixel // width * size / height), math.floor(pixel % width * size / width)
                cells.setdefault(cell, []).append(error[b, place].numpy())
            squares = [np.mean(np.mean(points, axis=0) ** 2) for points in cells.values()]
            total[b] += math.sqrt(height * width) / size * np.mean(squares)
            size //= 2
    return total


@pytest.mark.parametrize("size", [(16, 16), (24, 37), (9, 40)])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("max_size", [8, 20, 32])
def test_multiscale_loss_is_the_loop(size, share, max_size):
    coords = Coordinates.random(2, size, int(share * size[0] * size[1]), generator=generator("cpu", 0))
    prediction, target = (torch.randn(2, coords.num_points, 3, generator=generator("cpu", s)) for s in (1, 2))
    value = losses.multiscale_loss(prediction, target, coords, max_size)
    expected = multiscale_by_loops((prediction - target).double(), coords, max_size)
    torch.testing.assert_close(value.double(), torch.from_numpy(expected), rtol=1e-5, atol=0)
