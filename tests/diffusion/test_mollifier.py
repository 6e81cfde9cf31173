"""The mollifier against scipy, its algebra, and its statistics as an operator on functions over [0, 1]²."""

import math

import numpy as np
import pytest
import torch

from diffusion.mollifier import GaussianMollifier
from tests.reference import mollifier as reference
from utils.errors import UserError
from utils.rng import generator, sample_generators

SIZES = [(16, 16), (15, 15), (12, 21), (7, 32), (1, 5)]


def image(size, seed=0, dtype=torch.float64, batch=2, channels=3):
    return torch.randn(batch, channels, *size, dtype=dtype, generator=generator("cpu", seed))


def sigmas(sigma, size, train):
    return sigma * size[0] / train[0], sigma * size[1] / train[1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("train", [(16, 16), (10, 14)])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_blur_and_wiener_filter_agree_with_scipy(size, train, sigma):
    x, mollifier = image(size), GaussianMollifier(sigma, train, wiener_eps=0.07)
    kept = reference.attenuation(size, sigmas(sigma, size, train))
    torch.testing.assert_close(mollifier.blur(x).numpy(), reference.filtered(x.numpy(), kept))
    wiener = kept / (kept**2 + 0.07**2)
    torch.testing.assert_close(mollifier.sharpen(x).numpy(), reference.filtered(x.numpy(), wiener))
    torch.testing.assert_close(mollifier.blur(x.float()).double(), mollifier.blur(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_is_self_adjoint(size):
    mollifier, x, y = GaussianMollifier(1.3, 16), image(size, 0), image(size, 1)
    torch.testing.assert_close((mollifier.blur(x) * y).sum(), (x * mollifier.blur(y)).sum())


@pytest.mark.parametrize("size", SIZES)
def test_is_a_semigroup_in_sigma_squared(size):
    x = image(size)
    twice = GaussianMollifier(1.2, 16).blur(GaussianMollifier(0.9, 16).blur(x))
    torch.testing.assert_close(twice, GaussianMollifier(1.5, 16).blur(x))


@pytest.mark.parametrize("size", SIZES)
def test_constants_are_kept(size):
    x = torch.full((1, 1, *size), 0.7)
    torch.testing.assert_close(GaussianMollifier(2.0, 16).blur(x), x)


def test_is_a_gaussian_of_sigma_pixels_inside_the_image():
    """A unit pixel far from the border becomes exp(-d² / 2 sigma²) / (2 pi sigma²)."""
    x = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    x[..., 20, 20] = 1
    d = torch.arange(41, dtype=torch.float64) - 20
    expected = torch.exp(-(d[:, None] ** 2 + d**2) / (2 * 1.5**2)) / (2 * math.pi * 1.5**2)
    torch.testing.assert_close(GaussianMollifier(1.5, 41).blur(x)[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 20)])
def test_sharpening_undoes_blurring_of_smooth_images(size):
    rows = torch.cos(torch.pi * 4 * (torch.arange(size[0]) + 0.5) / size[0])
    columns = torch.cos(torch.pi * 3 * (torch.arange(size[1]) + 0.5) / size[1])
    x = (0.3 + rows[:, None] * columns)[None, None]
    mollifier = GaussianMollifier(1.0, 32)
    assert (mollifier.blur(x) - x).abs().max() > 0.05
    torch.testing.assert_close(mollifier.sharpen(mollifier.blur(x)), x, rtol=0, atol=0.005)


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (32, 32), (64, 64), (24, 40)])
def test_noise_has_the_same_variance_at_every_size(size):
    """The mean variance of T xi, from the matrix of T, is noise_variance."""
    mollifier = GaussianMollifier(1.0, 16)
    pixels = torch.eye(size[0] * size[1], dtype=torch.float64).view(-1, 1, *size)
    covariance_diagonal = mollifier.blur(mollifier.scale_noise(pixels)).square().sum(dim=0)  # T is symmetric
    tolerance = 0.07 if min(size) < 16 else 1e-3  # at half the resolution sigma is half a pixel, and Nyquist cuts some
    assert covariance_diagonal.mean().item() == pytest.approx(mollifier.noise_variance, rel=tolerance)


@pytest.mark.parametrize("sigma", [1.0, 1.7])
def test_noise_variance_inside_an_image_is_the_continuous_one(sigma):
    mollifier, size = GaussianMollifier(sigma, 48), (48, 48)
    unit = torch.zeros(1, 1, *size, dtype=torch.float64)
    unit[..., 24, 24] = 1
    assert mollifier.blur(unit).square().sum().item() == pytest.approx(1 / (4 * math.pi * sigma**2), rel=1e-3)
    border = 1 + math.sqrt(math.pi) * sigma / 48  # reflection doubles the variance there: a sum over k >= 0
    assert mollifier.noise_variance == pytest.approx(border**2 / (4 * math.pi * sigma**2), rel=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 96), (16, 16)])
def test_noise_has_the_same_correlation_as_a_function(size):
    """Correlation at distances in [0, 1] is exp(-d² R² / 4 sigma²), whatever the size of the image."""
    train, sigma = 32, 2.0
    noise = GaussianMollifier(sigma, train).noise_like(torch.empty(400, 1, *size), generator("cpu", 3))
    inner = noise[..., size[0] // 4 : -size[0] // 4, size[1] // 4 : -size[1] // 4]
    variance = inner.var().item()
    assert variance == pytest.approx(1 / (4 * math.pi * sigma**2), rel=0.05)
    for axis in (2, 3):
        lag = size[axis - 2] // 16  # a sixteenth of the axis: two training pixels
        moved = torch.roll(noise, -lag, dims=axis)[..., size[0] // 4 : -size[0] // 4, size[1] // 4 : -size[1] // 4]
        correlation = (inner * moved).mean().item() / variance
        assert correlation == pytest.approx(math.exp(-(2**2) / (4 * sigma**2)), abs=0.03)


def test_noise_of_a_sample_depends_on_its_generator_alone():
    mollifier = GaussianMollifier(1.0, 8)
    together = mollifier.noise_like(torch.empty(3, 2, 8, 12), sample_generators("cpu", [4, 7, 9], "noise"))
    alone = mollifier.noise_like(torch.empty(1, 2, 8, 12), sample_generators("cpu", [7], "noise"))
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (2, 16)])
def test_sigma_0_is_the_identity_at_any_size_and_shape(shape):
    mollifier, x = GaussianMollifier(0, 4), image((8, 9)).flatten()[: math.prod(shape)].view(shape)
    for method in (mollifier.blur, mollifier.sharpen, mollifier.scale_noise):
        assert torch.equal(method(x), x)
    assert mollifier.noise_variance == 1
    assert mollifier.noise_like(torch.empty(20_000, 4), generator("cpu", 0)).var().item() == pytest.approx(1, rel=0.02)


def test_is_float32_under_autocast_and_for_half_precision():
    mollifier, x = GaussianMollifier(1.0, 16), image((16, 20), dtype=torch.float32)
    expected = mollifier.blur(x), mollifier.sharpen(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mollifier.blur(x), expected[0]) and torch.equal(mollifier.sharpen(x), expected[1])
    half = mollifier.blur(x.bfloat16())
    assert half.dtype == torch.float32 and torch.equal(half, mollifier.blur(x.bfloat16().float()))


def test_matrix_reference_is_the_same_operator():
    x = image((5, 6), batch=1, channels=1)
    expected = reference.matrix((5, 6), (1.0, 1.0)) @ x.flatten().numpy()
    np.testing.assert_allclose(GaussianMollifier(1.0, (5, 6)).blur(x).flatten().numpy(), expected)


def test_mistakes():
    with pytest.raises(UserError, match=r"diffusion\.gaussian_filter_std=-1"):
        GaussianMollifier(-1, 8)
    with pytest.raises(ValueError, match="training resolution"):
        GaussianMollifier(1.0)
