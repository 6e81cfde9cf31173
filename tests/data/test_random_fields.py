"""Gaussian random fields: their spectrum is the formula, at any size, and they stay in range."""

import math

import pytest
import torch

from data.datasets.functions import pixel_centres
from data.random_fields import DEVIATION, MODES, POISSON, TAU, gaussian_field, poisson_pair, spectrum


@pytest.fixture(scope="module")
def fields():
    """300 fields at 40² pixels, float64."""
    positions = pixel_centres((40, 40)).double()
    return torch.stack([gaussian_field(positions, index)[..., 0] for index in range(300)])


def coefficients(images):
    """a_k of images [N, H, W] by the definition, a sum over pixels of value and cosines."""
    height, width = images.shape[-2:]
    axes = []
    for length in (height, width):
        k, u = torch.arange(length).double(), (torch.arange(length).double() + 0.5) / length
        basis = torch.cos(math.pi * k[:, None] * u) * math.sqrt(2) / length
        basis[0] /= math.sqrt(2)
        axes.append(basis)
    return axes[0] @ images @ axes[1].T


def test_coefficients_have_the_variance_of_the_formula(fields):
    """The z-scores of all variances together: mean 0 and variance 1, up to sampling error; nothing beyond mode 31."""
    power = coefficients(fields).square().mean(0)
    k1, k2 = torch.meshgrid(torch.arange(MODES), torch.arange(MODES), indexing="ij")
    formula = (math.pi**2 * (k1**2 + k2**2).double() + TAU**2) ** -2
    formula *= DEVIATION**2 / formula.sum()
    torch.testing.assert_close(spectrum().double(), formula, rtol=1e-5, atol=0)
    # rare clipping spreads over all modes, and shows where S is smallest: compare where it is not
    large = formula > 1e-4 * formula.max()
    score = (power[:MODES, :MODES] / formula - 1)[large] * math.sqrt(len(fields) / 2)
    assert large.sum() > 400 and abs(score.mean()) < 4 / large.sum() ** 0.5 and 0.8 < score.std() < 1.2
    assert power[MODES:].max() < 1e-7 and power[:, MODES:].max() < 1e-7


def test_fields_are_rarely_clipped(fields):
    assert fields.abs().max() <= 1 and (fields.abs() == 1).double().mean() < 5e-4
    assert fields.square().mean() == pytest.approx(DEVIATION**2, rel=0.05)


def test_a_field_is_a_function_of_index_and_position_alone(fields):
    positions = torch.rand(7, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = gaussian_field(positions, 3)
    torch.manual_seed(2)
    assert torch.equal(gaussian_field(positions, 3), first) and first.shape == (7, 5, 1)
    torch.testing.assert_close(gaussian_field(positions[2, 4], 3), first[2, 4])
    assert (gaussian_field(positions, 4) - first).abs().max() > 0.1
    torch.testing.assert_close(gaussian_field(pixel_centres((40, 40))[8, 9].double(), 5)[0], fields[5, 8, 9])


def test_the_second_field_of_a_pair_solves_the_poisson_equation():
    """With second differences of an image that mirrors itself at its border, the Neumann condition."""
    side = 256
    a, u = poisson_pair(pixel_centres((side, side)).double(), 5).unbind(-1)
    assert torch.equal(a, gaussian_field(pixel_centres((side, side)).double(), 5)[..., 0])
    padded = torch.nn.functional.pad(u[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    laplacian = (padded.diff(n=2, dim=0)[:, 1:-1] + padded.diff(n=2, dim=1)[1:-1]) * side**2
    torch.testing.assert_close(-laplacian, POISSON * (a - a.mean()), rtol=0, atol=0.02)
    assert u.mean().abs() < 1e-6 and 0.05 < u.std() < 0.4
