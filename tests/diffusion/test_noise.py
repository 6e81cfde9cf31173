"""T xi as one function: the same at every resolution, in every later step, with the distribution that it has alone."""

import math

import numpy as np
import pytest
import scipy.fft
import torch

from diffusion.mollifier import GaussianMollifier, coefficients
from utils.rng import generator, sample_generators

TRAIN = 12
SIZES = [(12, 12), (24, 24), (48, 48), (18, 31), (8, 40), (5, 9)]


def noise(size, sigma=1.0, batch=2, calls=1, train=TRAIN):
    """float64 array [B, 2, H, W]: what the generators of samples 0, 1, ... stand for, after `calls` calls."""
    generators = sample_generators("cpu", range(batch), "noise")
    mollifier, like = GaussianMollifier(sigma, train), torch.empty(batch, 2, *size, dtype=torch.float64)
    for _ in range(calls):
        drawn = mollifier.noise_like(like, generators)
    return drawn.numpy()


def coefficients_of(image):
    """Coefficients of the functions psi_k1 psi_k2 over [0, 1]² whose values at the pixels are the image."""
    return scipy.fft.dctn(image, axes=(-2, -1), norm="ortho") / math.sqrt(math.prod(image.shape[-2:]))


@pytest.mark.parametrize("sigma", [0.4, 1.0])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_sees_the_same_function(size, calls, sigma):
    """What two sizes can both hold agrees: in the first draw, and in those that a sampler adds later."""
    shared = [min(length, 31) for length in size]
    other, this = (coefficients_of(noise(one, sigma, calls=calls)) for one in ((31, 31), size))
    rows, columns = map(slice, shared)
    np.testing.assert_allclose(this[..., rows, columns], other[..., rows, columns], rtol=0, atol=1e-8)
    assert this.std() > 1e-4


@pytest.mark.parametrize("size", [(24, 24), (18, 31)])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_all_coefficients_are_independent_and_of_the_right_variance(size, sigma):
    """Also those above the Nyquist frequency of the training resolution: divided by T's factor they are white."""
    k = [np.arange(length) / TRAIN for length in size]
    kept = np.exp(-0.5 * (math.pi * sigma) ** 2 * np.add.outer(k[0] ** 2, k[1] ** 2))
    drawn = coefficients_of(noise(size, sigma, batch=200)) * TRAIN / kept
    seen = kept > 1e-6  # what is left out is invisible in float32
    assert seen[:TRAIN, :TRAIN].mean() > 0.9 and seen[TRAIN:, TRAIN:].mean() > (0.1 if sigma < 1 else -1)
    white = drawn[..., seen]
    assert np.abs(white.mean((0, 1))).max() < 5 / math.sqrt(400)
    assert np.abs(white.var((0, 1)) - 1).max() < 5 * math.sqrt(2 / 400)
    correlation = np.corrcoef(white.reshape(400, -1)[:, :: max(1, seen.sum() // 60)], rowvar=False)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / math.sqrt(400)


@pytest.mark.parametrize("window", [(slice(3, 9), slice(0, 5)), (slice(0, 24), slice(10, 31))])
def test_a_window_is_a_part_of_the_image(window):
    mollifier, like = GaussianMollifier(1.0, TRAIN), torch.empty(2, 3, 24, 31)
    whole = mollifier.noise_like(like, generator("cpu", 0))
    torch.testing.assert_close(mollifier.noise_at(like, (24, 31), window, generator("cpu", 0)), whole[(..., *window)])


@pytest.mark.parametrize("train", [(8, 8), (6, 10)])
def test_a_larger_count_adds_coefficients_and_changes_none(train):
    largest = coefficients((2, 3), (31, 31), train, generator("cpu", 0))
    for count in ((8, 8), (3, 20), (31, 1), (17, 25)):
        drawn = coefficients((2, 3), count, train, generator("cpu", 0))
        assert torch.equal(drawn, largest[..., : count[0], : count[1]])


def test_coefficients_are_all_different():
    """No two blocks, samples or channels repeat each other."""
    drawn = coefficients((2, 3), (24, 24), (8, 8), sample_generators("cpu", [0, 1], "x"))
    assert len(drawn.unique()) > 0.999 * drawn.numel()


def test_samplers_give_one_image_at_every_size():
    """Ancestral sampling of normal data, whose best denoiser is linear in each coefficient: the images agree."""
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
