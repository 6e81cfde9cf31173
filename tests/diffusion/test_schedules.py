"""Betas against their closed forms, respacing, and the tables of a chain."""

import math

import pytest
import torch

from configs.defaults import autoencoder_config, latent_config
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.schedules import (
    LOWEST,
    Schedule,
    half_log_snr,
    log_snr_timesteps,
    make_betas,
    respaced_timesteps,
)
from utils.config import ONE_OF
from utils.errors import UserError

NOISE_SCHEDULES = ONE_OF["diffusion.noise_schedule"]


def alpha_bar(betas):
    return torch.cumprod(1 - betas, dim=0)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_betas_are_valid_variances(name, steps):
    betas = make_betas(name, steps, resolution=96)
    assert betas.shape == (steps,) and betas.dtype == torch.float64
    assert ((betas > 0) & (betas <= 0.999)).all()


@pytest.mark.parametrize("steps", [10, 1000])
def test_cosine_follows_its_function(steps):
    u = torch.arange(1, steps, dtype=torch.float64) / steps
    expected = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(alpha_bar(make_betas("cosine", steps))[:-1], expected)


@pytest.mark.parametrize("resolution", [16, 64, 100, 256])
def test_shifted_cosine_moves_the_log_signal_to_noise_ratio(resolution):
    u = torch.arange(1, 1000, dtype=torch.float64) / 1000

    def shifted(u):
        odds = torch.tan((u + 0.008) / 1.008 * math.pi / 2) ** -2 * (64 / resolution) ** 2
        return odds / (1 + odds)

    expected = shifted(u) / shifted(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(alpha_bar(make_betas("shifted_cosine", 1000, resolution))[:-1], expected)


def test_linear_and_constant_keep_the_total_noise_at_any_number_of_steps():
    for name, total in [("linear", 1000 * 0.01005), ("const0.008", 8.0)]:
        for steps in (100, 1000):
            assert make_betas(name, steps).sum().item() == pytest.approx(total)
    assert make_betas("linear", 1000)[[0, -1]].tolist() == pytest.approx([1e-4, 2e-2])


def test_shifted_cosine_needs_a_resolution():
    with pytest.raises(UserError, match=r"diffusion\.noise_schedule='shifted_cosine'"):
        make_betas("shifted_cosine", 10)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 101, 1000])
def test_respaced_timesteps_are_distinct_ascending_and_even(total):
    for count in range(1, total + 1):
        steps = respaced_timesteps(total, count)
        assert len(steps) == count and steps[-1] == total - 1
        if count > 1:
            gaps = [b - a for a, b in zip(steps[:-1], steps[1:], strict=True)]
            assert steps[0] == 0 and min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
            assert all(abs(step - i * (total - 1) / (count - 1)) <= 0.5 for i, step in enumerate(steps))


@pytest.mark.parametrize("count", [0, -1, 11])
def test_respacing_to_an_impossible_count_is_a_user_error(count):
    with pytest.raises(UserError, match=rf"^--sampling_steps={count} must lie between 1 and diffusion.steps=10"):
        respaced_timesteps(10, count)
    with pytest.raises(UserError, match=rf"^--sampling_steps={count} must lie between 1 and diffusion.steps=10"):
        log_snr_timesteps(make_betas("linear", 10), count)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 3, 10, 101])
def test_log_snr_timesteps_are_distinct_and_ascending(name, total):
    betas = make_betas(name, total, 64)
    for count in range(1, total + 1):
        steps = log_snr_timesteps(betas, count)
        assert len(steps) == count and steps[-1] == total - 1 and all(isinstance(step, int) for step in steps)
        assert count == 1 or steps[0] == 0
        assert all(a < b for a, b in zip(steps[:-1], steps[1:], strict=True))


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("count", [2, 5, 20])
def test_log_snr_timesteps_are_those_next_to_even_ratios_from_the_lowest_on(name, count):
    betas = make_betas(name, 100_000, 64)  # so many that no two ratios want the same step
    ratio = half_log_snr(torch.cumprod(1 - betas, 0))
    steps, gap = log_snr_timesteps(betas, count), (max(ratio[-1], LOWEST) - ratio[0]) / (count - 1)
    for i, step in enumerate(steps[1:-1], start=1):
        between = (ratio[step - 1 : step + 1] + ratio[step : step + 2]) / 2  # rounded, not cut
        slack = 0.1 * (ratio[step - 1] - ratio[step + 1])  # the ratio is not linear in time
        assert between[1] - slack < ratio[0] + i * gap < between[0] + slack


def test_a_solver_gets_steps_even_in_log_snr_and_the_others_in_time():
    for cfg in (autoencoder_config(64), latent_config()):
        total, betas = cfg.diffusion.steps, make_betas(cfg.diffusion.noise_schedule, cfg.diffusion.steps)
        for sampler, steps in (("dpm_solver", log_snr_timesteps(betas, 20)), ("ddim", respaced_timesteps(total, 20)),
                               ("ddpm", respaced_timesteps(total, 20))):
            assert build_diffusion(cfg, 20, sampler).schedule.timesteps.tolist() == steps
        assert build_diffusion(cfg, 20).schedule.timesteps.tolist() == respaced_timesteps(total, 20)


@pytest.mark.parametrize("count", [1, 2, 9, 100, 1000])
def test_respaced_chain_has_the_same_alpha_bar_at_its_steps(count):
    betas = make_betas("cosine", 1000)
    full, part = Schedule.from_betas(betas), Schedule.from_betas(betas, respaced_timesteps(1000, count))
    torch.testing.assert_close(part.alpha_bar, full.alpha_bar[part.timesteps], rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cumprod(1 - part.betas, 0), part.alpha_bar, rtol=1e-9, atol=1e-15)
    assert len(part) == count and part.total == 1000


def test_posterior_of_step_0_is_x0_itself():
    schedule = Schedule.from_betas(make_betas("cosine", 1000), [3, 500, 999])
    assert (schedule.posterior_x0[0], schedule.posterior_xt[0], schedule.posterior_variance[0]) == (1, 0, 0)
    assert (schedule.variance_small > 0).all() and (schedule.variance_large >= schedule.variance_small).all()
    torch.testing.assert_close(schedule.variance_large[1:], schedule.betas[1:])


def test_a_chain_of_one_step_has_all_tables():
    schedule = Schedule.from_betas(make_betas("cosine", 1000), [999])
    assert schedule.variance_small.tolist() == schedule.variance_large.tolist() == schedule.betas.tolist()
    assert list(schedule.ascending_pairs()) == []
    assert [(t, float(a_prev)) for t, _, a_prev in schedule.reversed_pairs()] == [(0, 1.0)]


@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_lookup_broadcasts_and_is_never_less_than_float32(dtype, expected):
    schedule = Schedule.from_betas(make_betas("cosine", 1000))
    t = torch.tensor([0, 999])
    value = schedule.at("sqrt_one_minus_alpha_bar", t, torch.zeros(2, 3, 4, 5, dtype=dtype))
    assert value.shape == (2, 1, 1, 1) and value.dtype == expected
    torch.testing.assert_close(value.flatten().double(), (1 - schedule.alpha_bar[t]).sqrt(), rtol=1e-7, atol=0)
