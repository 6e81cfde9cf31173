"""Posterior sampling against closed forms: with a Gaussian random field as prior, denoiser and posterior are known."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from data.random_fields import POISSON, inverse_laplacian, spectrum
from diffusion.mollifier import GaussianMollifier, dct_matrix
from diffusion.operators import Channels, Downsampling, Mask, Points
from diffusion.posterior import PosteriorDenoiser, Spectrum
from diffusion.samplers import dpm_solver
from diffusion.schedules import Schedule, log_snr_timesteps, make_betas
from tests.reference import gaussian_posterior as reference
from tests.reference.mollifier import attenuation, filtered
from utils.rng import generator, rand, randn

TRAIN = 16  # the training resolution
NOISE = 0.05


def field_spectrum(modes=TRAIN):
    """S [1, 1, modes, modes] of the random field, without its finest details."""
    return spectrum()[None, None, :modes, :modes].double().numpy()


def poisson_spectrum(modes=TRAIN):
    """S [2, 2, modes, modes] of the pair (a, u), −Δu = POISSON a."""
    pair = torch.stack([torch.ones(modes, modes), POISSON * inverse_laplacian()[:modes, :modes]]).double().numpy()
    return field_spectrum(modes) * pair[:, None] * pair


def of_size(power, size):
    """The Spectrum of the fields' images."""
    covariance = torch.zeros(*power.shape[:2], *size, dtype=torch.float64)
    rows, columns = (min(power.shape[-1], length) for length in size)
    covariance[..., :rows, :columns] = torch.from_numpy(power[..., :rows, :columns]) * math.prod(size)
    return Spectrum.of_covariance(covariance)


class Process(NamedTuple):
    """The part of a GaussianDiffusion that matters here."""

    schedule: Schedule
    mollifier: GaussianMollifier


class ExactDenoiser:
    """E[T x_0 | x_t] of a field: one linear filter per step."""

    def __init__(self, schedule, mollifier, prior):
        self.schedule, self.mollifier, self.prior = schedule, mollifier, prior

    def __call__(self, x, t):
        a = self.schedule.at("alpha_bar", t[:1], x)[0]
        noise = (1 - a) * self.mollifier.scale_noise(torch.ones_like(x[0])) ** 2
        return self.prior.to(x).apply(lambda variance: a.sqrt() * variance / (a * variance + noise), x)


def schedule_of(steps):
    betas = make_betas("cosine", 1000)
    return Schedule.from_betas(betas, log_snr_timesteps(betas, steps))


def few_pixels(size):
    count, pixels = round(0.03 * size[0] * size[1]), size[0] * size[1]
    place = torch.randperm(pixels, generator=generator("cpu", "pixels"))[:count]
    return Mask((torch.zeros(pixels).index_fill(0, place, 1) > 0).view(1, 1, *size), NOISE)


def few_points(size):
    return Points(rand((1, 12, 2), generator("cpu", "points")), size, NOISE)


OPERATORS = {"3 % of the pixels": few_pixels, "down-sampling": lambda size: Downsampling(size, (4, 4), NOISE),
             "points": few_points, "u at points": lambda size: Channels(few_points(size), [1], 2),
             "u at all pixels": lambda size: Channels(Mask(torch.ones(1, 1, *size, dtype=torch.bool), NOISE), [1], 2)}


def power_of(name, modes=TRAIN):
    return poisson_spectrum(modes) if name.startswith("u ") else field_spectrum(modes)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_estimate_is_the_conditional_mean_given_state_and_data(name, size, sigma):
    """x_t = T(a x_0 + b ξ) and y = A x_0 + n as one linear measurement of x_0, by dense matrices."""
    power, operator, schedule = power_of(name, min(size)), OPERATORS[name](size), schedule_of(10)
    shape = (len(power), *size)
    mollifier = GaussianMollifier(sigma, 8, wiener_eps=0.0)  # the filter is then the inverse of T
    root, matrix = reference.prior_square_root(power, size), reference.matrix_of(operator, shape)
    for t in (1, 5, 8):
        a, noise = schedule.alpha_bar[t].item(), 1 - schedule.alpha_bar[t].item()
        noise *= math.prod(size) / 64 if sigma else 1
        state = randn((2, *shape), generator("cpu", t)).double()  # any will do: both are linear
        data = randn((2, len(matrix)), generator("cpu", t + 1)).double()
        both = np.concatenate([matrix / NOISE, np.eye(root.shape[0]) * math.sqrt(a / noise)])
        seen = np.concatenate([data / NOISE, state.flatten(1) / math.sqrt(noise)], axis=1)
        expected, _ = reference.posterior(root, both, 1.0, seen)

        prior = of_size(power, size)
        denoise = PosteriorDenoiser(ExactDenoiser(schedule, mollifier, prior), Process(schedule, mollifier), operator,
                                    data.view(2, *operator.A(state).shape[1:]), prior, tolerance=1e-9)
        estimate = mollifier.sharpen(denoise(mollifier.blur(state), torch.tensor([t, t])))
        np.testing.assert_allclose(estimate.flatten(1), expected, atol=1e-4 * np.abs(expected).max())


def posterior_samples(name, size, count=100, steps=20):
    """(samples [N, P], exact mean, exact standard deviation [P], that of a value of the prior) for one field's data."""
    power, operator, mollifier = power_of(name), OPERATORS[name](size), GaussianMollifier(1.0, TRAIN)
    shape, schedule, prior = (len(power), *size), schedule_of(steps), of_size(power, size)
    root = reference.prior_square_root(power, size)
    truth = reference.draw(root, 1, np.random.default_rng(0))
    data = operator.A(torch.from_numpy(truth).view(1, *shape))
    data = data + NOISE * randn(data.shape, generator("cpu", "noise"))
    mean, half = reference.posterior(root, reference.matrix_of(operator, shape), NOISE, data.flatten(1).numpy())

    denoise = PosteriorDenoiser(ExactDenoiser(schedule, mollifier, prior), Process(schedule, mollifier), operator,
                                data.float().expand(count, *data.shape[1:]), prior)
    start = mollifier.noise_like(torch.zeros(count, *shape), generator("cpu", "samples"))
    *_, (_, state) = dpm_solver(denoise, start, schedule)
    kept = attenuation(size, [length / TRAIN for length in size])
    kept = kept**2 / (kept**2 + mollifier.wiener_eps**2)  # of the details, by mollifying and sharpening

    def seen(rows):
        return filtered(rows.reshape(-1, *shape), kept).reshape(len(rows), -1)

    return (mollifier.sharpen(state).flatten(1).double().numpy(), seen(mean)[0],
            np.sqrt(np.square(seen(half.T)).sum(0)), np.sqrt(np.square(root).sum(1)))


def rms(values):
    return np.sqrt(np.square(values).mean())


@pytest.mark.parametrize("name, scale", [("points", 1), ("down-sampling", 1), *[
    pytest.param(*case, marks=pytest.mark.slow) for case in (
        *((name, 1) for name in [*OPERATORS] if name not in ("points", "down-sampling")),
        *((name, 2) for name in OPERATORS if name != "u at all pixels"))]])
def test_samples_have_the_mean_and_the_spread_of_the_posterior(name, scale):
    """In every channel: of a Poisson pair, u is measured and a is recovered."""
    found = posterior_samples(name, (scale * TRAIN, scale * TRAIN))
    channels = 2 if name.startswith("u ") else 1
    for samples, mean, deviation, prior in zip(*(np.split(part, channels, axis=-1) for part in found), strict=True):
        assert rms(mean) > 0.3 * rms(prior) and rms(deviation) < 0.85 * rms(prior)  # the data say something, not all
        assert rms(samples.mean(0) - mean) < 1.6 * rms(deviation) / math.sqrt(len(samples))
        assert rms(samples.std(0)) == pytest.approx(rms(deviation), rel=0.08)
        assert np.corrcoef(samples.std(0), deviation)[0, 1] > 0.85


def test_the_spectrum_of_images_is_that_of_their_coefficients():
    """Also between channels: those of white noise, of which one channel is mixed into another."""
    white = randn((4000, 2, 5, 6), generator("cpu", 0)).double()
    images = torch.stack([white[:, 0] + 0.5, 2 * white[:, 0] + white[:, 1]], dim=1)
    found = Spectrum.of_images(images)
    assert found.values.shape == (2, 5, 6)
    covariance = torch.einsum("cdhw,dhw,edhw->cehw", found.vectors, found.values, found.vectors)
    expected = torch.tensor([[1.0, 2.0], [2.0, 5.0]]).double()[:, :, None, None].expand(2, 2, 5, 6)
    torch.testing.assert_close(covariance, expected, rtol=0.15, atol=0)


def test_the_spectrum_at_another_size_is_that_of_the_same_functions():
    """Fields of few modes, drawn at both sizes from the same coefficients."""
    coefficients = randn((50, 1, 4, 4), generator("cpu", 1)).double()

    def images(size):
        rows, columns = (dct_matrix(length, torch.device("cpu"), torch.float64)[:4] * math.sqrt(length)
                         for length in size)
        return rows.T @ coefficients @ columns

    small, large = (Spectrum.of_images(images(size)) for size in ((8, 6), (16, 9)))
    torch.testing.assert_close(small.at((16, 9)).values, large.values)
    torch.testing.assert_close(large.at((8, 6)).values, small.values)
