"""Every mean type leads from its own target back to T x_0; preconditioning is the optimal linear predictor."""

import pytest
import torch

from data.coordinates import Coordinates
from diffusion.mollifier import GaussianMollifier
from diffusion.parameterisation import Parameterisation
from diffusion.schedules import Schedule, make_betas
from utils.config import ONE_OF
from utils.rng import generator, randn

MEAN_TYPES = ONE_OF["diffusion.model_mean_type"]
SCHEDULE = Schedule.from_betas(make_betas("cosine", 1000))
T = torch.tensor([0, 1, 500, 990, 999])


def process(size, sigma, mean_type, seed=0):
    """x_0, xi, x_t (float64 images), and the parameterisation."""
    mollifier = GaussianMollifier(sigma, 12)
    source = generator("cpu", seed)
    x0, noise = (randn((len(T), 3, *size), source).double() for _ in range(2))
    xi = mollifier.scale_noise(noise)
    a, b = (SCHEDULE.at(name, T, x0) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
    return x0, xi, mollifier.blur(a * x0 + b * xi), Parameterisation(mean_type, SCHEDULE, mollifier)


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("size", [(12, 12), (24, 9), (7, 13)])
def test_estimate_from_the_target_is_t_x0(mean_type, sigma, size):
    x0, xi, x_t, parameterisation = process(size, sigma, mean_type)
    coords = Coordinates.full(len(T), size)
    target = coords.gather(parameterisation.target(x0, xi, T))
    estimate = parameterisation.estimate(target, coords.gather(x_t), T, coords)
    torch.testing.assert_close(coords.scatter(estimate), parameterisation.mollifier.blur(x0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_targets_are_what_they_are_called(mean_type):
    x0, xi, _, parameterisation = process((8, 10), 1.0, mean_type)
    a, b = (SCHEDULE.alpha_bar[T] ** 0.5).view(-1, 1, 1, 1), ((1 - SCHEDULE.alpha_bar[T]) ** 0.5).view(-1, 1, 1, 1)
    expected = {
        "mollified_epsilon": GaussianMollifier(1.0, 12).blur(xi), "epsilon": xi, "v": a * xi - b * x0, "xstart": x0
    }
    torch.testing.assert_close(parameterisation.target(x0, xi, T), expected[mean_type])


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_error_of_the_estimate_is_the_difference_of_two_estimates(mean_type):
    x0, xi, x_t, parameterisation = process((8, 10), 1.0, mean_type)
    coords = Coordinates.full(len(T), (8, 10))
    values, target = coords.gather(x_t), coords.gather(parameterisation.target(x0, xi, T))
    error = 0.1 * torch.randn(target.shape, dtype=torch.float64, generator=generator("cpu", 1))
    moved = parameterisation.estimate(target + error, values, T, coords)
    difference = moved - parameterisation.estimate(target, values, T, coords)
    torch.testing.assert_close(parameterisation.estimate_error(error, T, coords), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_points", [20, 80, 119])
def test_on_a_subset_the_mollifier_is_a_weighted_mean_of_what_is_there(num_points):
    """It keeps constants, as T does."""
    _, _, _, parameterisation = process((10, 12), 1.0, "xstart")
    coords = Coordinates.random(len(T), (10, 12), num_points, generator=generator("cpu", 2))
    constant = torch.full((len(T), num_points, 3), 0.3, dtype=torch.float64)
    torch.testing.assert_close(parameterisation.estimate_error(constant, T, coords), constant)


def test_without_coordinates_the_values_are_the_state():
    for mean_type in MEAN_TYPES:
        parameterisation = Parameterisation(mean_type, SCHEDULE, GaussianMollifier(0))
        x0, xi = (torch.randn(len(T), 6, dtype=torch.float64, generator=generator("cpu", seed)) for seed in (0, 1))
        a, b = (SCHEDULE.at(name, T, x0) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
        target = parameterisation.target(x0, xi, T)
        estimate = parameterisation.estimate(target, a * x0 + b * xi, T, None)
        torch.testing.assert_close(estimate, x0, rtol=0, atol=1e-8)


def test_preconditioning_is_the_best_linear_predictor():
    """With F = 0, f is the least-squares regression of T xi on x_t; with F of unit variance, f has its residual."""
    samples, v_d = 1000, 0.25
    mollifier = GaussianMollifier(1.0, 32)
    parameterisation = Parameterisation("mollified_epsilon", SCHEDULE, mollifier, data_variance=v_d)
    # two samples that are uncorrelated and of unit variance exactly, not just in expectation
    drawn = torch.randn(samples, 2, dtype=torch.float64, generator=generator("cpu", 0))
    tx0, txi = torch.linalg.qr(drawn).Q.T * samples**0.5
    tx0, txi = v_d**0.5 * tx0, mollifier.noise_variance**0.5 * txi
    for step in (50, 400, 800, 990):
        a, b = SCHEDULE.alpha_bar[step].sqrt(), (1 - SCHEDULE.alpha_bar[step]).sqrt()
        x_t, t = (a * tx0 + b * txi)[:, None, None], torch.full((samples,), step)
        slope = (x_t.flatten() @ txi) / x_t.square().sum()
        skip = parameterisation.prediction(torch.zeros_like(x_t), x_t, t).flatten()
        torch.testing.assert_close(skip, slope * x_t.flatten())
        residual = (txi - slope * x_t.flatten()).square().mean().sqrt()
        output = parameterisation.prediction(torch.ones_like(x_t), x_t, t).flatten() - skip
        torch.testing.assert_close(output, residual.expand(samples))
        balanced = parameterisation.balance(t, residual.expand(samples)) * residual**2
        torch.testing.assert_close(balanced, torch.full_like(balanced, mollifier.noise_variance))
