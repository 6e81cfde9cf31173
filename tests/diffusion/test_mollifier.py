"""T against scipy, its algebra, and its noise as one function of [0, 1]² at every resolution."""

import math

import numpy as np
import pytest
import scipy.fft
import torch

from diffusion.mollifier import GaussianMollifier, coefficients
from tests.reference import mollifier as reference
from utils.rng import generator, sample_generators

SIZES = [(16, 16), (15, 15), (12, 21), (7, 32), (1, 5)]
TRAIN = 12


def image(size, seed=0, dtype=torch.float64, batch=2, channels=3):
    return torch.randn(batch, channels, *size, dtype=dtype, generator=generator("cpu", seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("train", [(16, 16), (10, 14)])
@pytest.mark.parametrize("sigma", [0.5, 2.5])
def test_blur_and_wiener_filter_agree_with_scipy(size, train, sigma):
    x, mollifier = image(size), GaussianMollifier(sigma, train, wiener_eps=0.07)
    kept = reference.attenuation(size, [sigma * length / whole for length, whole in zip(size, train, strict=True)])
    torch.testing.assert_close(mollifier.blur(x).numpy(), reference.filtered(x.numpy(), kept))
    wiener = kept / (kept**2 + 0.07**2)
    torch.testing.assert_close(mollifier.sharpen(x).numpy(), reference.filtered(x.numpy(), wiener))
    torch.testing.assert_close(mollifier.blur(x.float()).double(), mollifier.blur(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_self_adjoint_semigroup_that_keeps_constants(size):
    mollifier, x, y = GaussianMollifier(1.3, 16), image(size, 0), image(size, 1)
    torch.testing.assert_close((mollifier.blur(x) * y).sum(), (x * mollifier.blur(y)).sum())
    twice = GaussianMollifier(1.2, 16).blur(GaussianMollifier(0.9, 16).blur(x))
    torch.testing.assert_close(twice, GaussianMollifier(1.5, 16).blur(x))
    torch.testing.assert_close(mollifier.blur(torch.full_like(x, 0.7)), torch.full_like(x, 0.7))


def test_gaussian_of_sigma_pixels_inside_the_image():
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


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (2, 16)])
def test_sigma_0_is_the_identity_for_any_shape(shape):
    mollifier, x = GaussianMollifier(0, 4), image((8, 9)).flatten()[: math.prod(shape)].view(shape)
    for method in (mollifier.blur, mollifier.sharpen, mollifier.scale_noise):
        assert torch.equal(method(x), x)
    assert mollifier.noise_variance == 1
    assert mollifier.noise_like(torch.empty(20_000, 4), generator("cpu", 0)).var().item() == pytest.approx(1, rel=0.02)


def test_float32_under_autocast_and_for_half_precision():
    mollifier, x = GaussianMollifier(1.0, 16), image((16, 20), dtype=torch.float32)
    expected = mollifier.blur(x), mollifier.sharpen(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mollifier.blur(x), expected[0]) and torch.equal(mollifier.sharpen(x), expected[1])
    half = mollifier.blur(x.bfloat16())
    assert half.dtype == torch.float32 and torch.equal(half, mollifier.blur(x.bfloat16().float()))


def test_sigma_without_a_training_resolution_is_refused():
    with pytest.raises(ValueError, match="training resolution"):
        GaussianMollifier(1.0)


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (32, 32), (24, 40)])
def test_noise_has_the_same_variance_at_every_size(size):
    """The mean variance of T xi, from the matrix of T, is noise_variance."""
    mollifier = GaussianMollifier(1.0, 16)
    pixels = torch.eye(size[0] * size[1], dtype=torch.float64).view(-1, 1, *size)
    covariance_diagonal = mollifier.blur(mollifier.scale_noise(pixels)).square().sum(dim=0)  # T is symmetric
    tolerance = 0.07 if min(size) < 16 else 1e-3  # below the training resolution Nyquist removes some of it
    assert covariance_diagonal.mean().item() == pytest.approx(mollifier.noise_variance, rel=tolerance)


@pytest.mark.parametrize("sigma", [1.0, 1.7])
def test_noise_variance_is_the_continuous_one(sigma):
    mollifier, size = GaussianMollifier(sigma, 48), (48, 48)
    unit = torch.zeros(1, 1, *size, dtype=torch.float64)
    unit[..., 24, 24] = 1
    assert mollifier.blur(unit).square().sum().item() == pytest.approx(1 / (4 * math.pi * sigma**2), rel=1e-3)
    border = 1 + math.sqrt(math.pi) * sigma / 48  # reflection doubles the variance there: a sum over k >= 0
    assert mollifier.noise_variance == pytest.approx(border**2 / (4 * math.pi * sigma**2), rel=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (16, 16)])
def test_noise_has_the_same_correlation_as_a_function(size):
    """Correlation at distances in [0, 1] is exp(-d² R² / 4 sigma²) at every size."""
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


def noise(size, sigma=1.0, batch=2, calls=1):
    """float64 array [B, 2, H, W]: noise of samples 0, 1, ... in the given call of noise_like."""
    generators = sample_generators("cpu", range(batch), "noise")
    mollifier, like = GaussianMollifier(sigma, TRAIN), torch.empty(batch, 2, *size, dtype=torch.float64)
    for _ in range(calls):
        drawn = mollifier.noise_like(like, generators)
    return drawn.numpy()


def coefficients_of(image):
    """Coefficients of the functions psi_k1 psi_k2 over [0, 1]² whose values at the pixels are the image."""
    return scipy.fft.dctn(image, axes=(-2, -1), norm="ortho") / math.sqrt(math.prod(image.shape[-2:]))


@pytest.mark.parametrize("sigma", [0.4, 1.0])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("size", [(12, 12), (24, 24), (48, 48), (18, 31), (8, 40), (5, 9)])
def test_every_size_sees_the_same_function(size, calls, sigma):
    """Coefficients that two sizes share agree, also in later draws of a sampler."""
    rows, columns = (slice(min(length, 31)) for length in size)
    other, this = (coefficients_of(noise(one, sigma, calls=calls)) for one in ((31, 31), size))
    np.testing.assert_allclose(this[..., rows, columns], other[..., rows, columns], rtol=0, atol=1e-8)
    assert this.std() > 1e-4


@pytest.mark.parametrize("size", [(24, 24), (18, 31)])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_coefficients_are_independent_and_white(size, sigma):
    """Also those above the Nyquist frequency of the training resolution."""
    k = [np.arange(length) / TRAIN for length in size]
    kept = np.exp(-0.5 * (math.pi * sigma) ** 2 * np.add.outer(k[0] ** 2, k[1] ** 2))
    drawn = coefficients_of(noise(size, sigma, batch=200)) * TRAIN / kept
    seen = kept > 1e-6  # the rest does not show in float32
    assert seen[:TRAIN, :TRAIN].mean() > 0.9 and (sigma == 1 or seen[TRAIN:, TRAIN:].mean() > 0.1)
    white = drawn[..., seen]
    assert np.abs(white.mean((0, 1))).max() < 5 / math.sqrt(400)
    assert np.abs(white.var((0, 1)) - 1).max() < 5 * math.sqrt(2 / 400)
    correlation = np.corrcoef(white.reshape(400, -1)[:, :: max(1, seen.sum() // 60)], rowvar=False)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / math.sqrt(400)


@pytest.mark.parametrize("window", [(slice(3, 9), slice(0, 5)), (slice(0, 24), slice(10, 31))])
def test_noise_at_a_window_is_that_part_of_the_image(window):
    mollifier, like = GaussianMollifier(1.0, TRAIN), torch.empty(2, 3, 24, 31)
    whole = mollifier.noise_like(like, generator("cpu", 0))
    torch.testing.assert_close(mollifier.noise_at(like, (24, 31), window, generator("cpu", 0)), whole[(..., *window)])


@pytest.mark.parametrize("train", [(8, 8), (6, 10)])
def test_a_larger_count_adds_coefficients_and_changes_none(train):
    largest = coefficients((2, 3), (31, 31), train, sample_generators("cpu", [0, 1], "x"))
    assert len(largest.unique()) > 0.999 * largest.numel()  # no two blocks, samples or channels repeat each other
    for count in ((8, 8), (3, 20), (31, 1), (17, 25)):
        drawn = coefficients((2, 3), count, train, sample_generators("cpu", [0, 1], "x"))
        assert torch.equal(drawn, largest[..., : count[0], : count[1]])


def test_samplers_give_one_image_at_every_size():
    """Ancestral sampling of normal data, whose best denoiser is linear in each coefficient."""
    from tests.diffusion.test_samplers import ALL, last, normal_denoiser, schedule_of

    schedule, mollifier = schedule_of(20), GaussianMollifier(1.0, TRAIN)
    for name, sampler in ALL.items():
        parts = []
        for size in ((12, 12), (24, 24), (20, 36)):
            generators = sample_generators("cpu", [0, 1], name)
            start = mollifier.noise_like(torch.empty(2, 3, *size, dtype=torch.float64), generators)
            extra = {} if name in ("ddim", "dpm_solver") else {
                "generator": generators, "noise_like": mollifier.noise_like}
            image = last(sampler(normal_denoiser(schedule), start, schedule, **extra))
            parts.append(coefficients_of(image.numpy())[..., :TRAIN, :TRAIN])
        for part in parts[1:]:
            np.testing.assert_allclose(part, parts[0], rtol=0, atol=1e-5, err_msg=name)
