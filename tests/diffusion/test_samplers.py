"""Samplers on problems with a known answer: an oracle that knows T x_0, and normal data, where everything is linear."""

import functools

import pytest
import torch

from configs.defaults import autoencoder_config
from data.coordinates import Coordinates
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.mollifier import GaussianMollifier
from diffusion.samplers import SAMPLERS, ddim, ddim_invert, ddpm, dpm_solver, sample
from diffusion.schedules import Schedule, log_snr_timesteps, make_betas, respaced_timesteps
from utils.rng import generator, randn, sample_generators

ALL = {
    "ddpm": ddpm,
    "ddim": ddim,
    "ddim, eta 0.5": functools.partial(ddim, eta=0.5),
    "ddim, eta 1": functools.partial(ddim, eta=1.0),
    "dpm_solver": dpm_solver,
}
VARIANCE = 0.3  # of the normal data below


def schedule_of(steps, name="cosine"):
    return Schedule.from_betas(make_betas(name, 1000), respaced_timesteps(1000, steps))


def last(path):
    *_, (_, x) = path
    return x


def normal_denoiser(schedule, variance=VARIANCE):
    """E[x_0 | x_t] for x_0 ~ N(0, variance): the best denoiser, linear in x_t."""

    def denoise(x, t):
        a = schedule.alpha_bar[t].view(-1, *[1] * (x.dim() - 1))
        return a.sqrt() * variance / (a * variance + 1 - a) * x

    return denoise


def exact_path_end(schedule, x, variance=VARIANCE):
    """The probability flow of normal data keeps x_t / std(x_t)."""
    a = schedule.alpha_bar[-1]
    return x * (variance / (a * variance + 1 - a)).sqrt()


@pytest.mark.parametrize("sampler", ALL.values(), ids=ALL)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 1, 5, 9), (4, 6)])
def test_an_oracle_is_recovered_exactly(sampler, steps, shape):
    x0, start = randn(shape, generator("cpu", 0)), randn(shape, generator("cpu", 1))
    seen = []

    def denoise(x, t):
        assert x.shape == shape and t.shape == shape[:1] and t.dtype == torch.int64 and x.dtype == torch.float32
        seen.append(t[0].item())
        return x0

    path = list(sampler(denoise, start, schedule_of(steps)))
    assert seen == [t for t, _ in path] == list(reversed(range(steps)))
    assert torch.equal(path[-1][1], x0)


@pytest.mark.parametrize("sampler", ALL.values(), ids=ALL)
def test_the_last_state_is_the_last_estimate(sampler):
    """Whatever the network says, and so clipped if the denoiser clips."""
    estimates = []

    def denoise(x, t):
        estimates.append((3 * x).clamp(-1, 1))
        return estimates[-1]

    x = last(sampler(denoise, randn((2, 3, 4, 4), generator("cpu", 0)), schedule_of(6)))
    assert torch.equal(x, estimates[-1]) and x.abs().max() == 1


def test_ddim_is_the_published_update():
    schedule, x = schedule_of(5), randn((2, 3), generator("cpu", 0)).double()
    denoise = normal_denoiser(schedule)
    for t, state in ddim(denoise, x, schedule):
        a = schedule.alpha_bar[t]
        a_prev = schedule.alpha_bar[t - 1] if t else torch.ones((), dtype=torch.float64)
        x0 = denoise(x, torch.full((2,), t))
        noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
        x = a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * noise
        torch.testing.assert_close(state, x)


def test_dpm_solver_is_the_published_update():
    """Lu et al. 2022, algorithm 2, in its own symbols, with r at least 1; the steps in log SNR are far from even."""
    schedule, x = schedule_of(6), randn((2, 3), generator("cpu", 0)).double()
    denoise = normal_denoiser(schedule)
    lam = 0.5 * torch.logit(schedule.alpha_bar)
    predictions = {}
    for t, state in dpm_solver(denoise, x, schedule):
        predictions[t] = denoise(x, torch.full((2,), t))
        if t == 0:
            x = predictions[0]
        else:
            h = lam[t - 1] - lam[t]
            guess = predictions[t]
            if t < 5:
                r = max((lam[t] - lam[t + 1]) / h, 1)
                guess = (1 + 1 / (2 * r)) * predictions[t] - 1 / (2 * r) * predictions[t + 1]
            alpha, sigma, sigma_last = (v.sqrt() for v in (
                schedule.alpha_bar[t - 1], 1 - schedule.alpha_bar[t - 1], 1 - schedule.alpha_bar[t]
            ))
            x = sigma / sigma_last * x - alpha * (torch.exp(-h) - 1) * guess
        torch.testing.assert_close(state, x)


def test_dpm_solver_passes_on_errors_of_the_network_hardly_more_than_ddim_does():
    """Independent ones, at the uneven steps that few steps of the linear schedule make in log SNR."""
    schedule = schedule_of(20, "linear")
    ends = {}
    for sampler in (ddim, dpm_solver):
        source = generator("cpu", 0)
        for t, x in sampler(lambda x, t, source=source: randn(x.shape, source), torch.zeros(1, 10_000), schedule):
            if t == 1:  # the step to 0 that follows gives the last estimate
                ends[sampler] = x.std().item()
    assert ends[dpm_solver] < 1.6 * ends[ddim]


def test_dpm_solver_is_of_higher_order_than_ddim():
    """Steps twice as small: DDIM's error halves, the error of 2M falls by nearly four. On even steps of log SNR."""

    def error(sampler, steps):
        log_snr = torch.linspace(6, -6, steps + 1, dtype=torch.float64).flip(0)
        schedule = Schedule(torch.sigmoid(log_snr.flip(0)), torch.arange(steps + 1), steps + 1)
        x = torch.ones(1, 1, dtype=torch.float64)
        # the state of step 0: the last step to alpha_bar = 1 is the same first-order one in both
        *_, (t, state), _ = sampler(normal_denoiser(schedule), x, schedule)
        a, a_end = schedule.alpha_bar[-1], schedule.alpha_bar[0]
        std, std_end = (a * VARIANCE + 1 - a).sqrt(), (a_end * VARIANCE + 1 - a_end).sqrt()
        assert t == 1
        return (state - x * std_end / std).abs().item()

    orders = {s: torch.tensor(error(s, 100) / error(s, 200)).log2().item() for s in (ddim, dpm_solver)}
    assert orders[ddim] == pytest.approx(1, abs=0.2)
    assert orders[dpm_solver] == pytest.approx(2, abs=0.3)
    assert error(dpm_solver, 100) < error(ddim, 100) / 10


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_few_steps_even_in_log_snr_keep_the_contrast_of_details(name):
    """Details are components of little variance; by 20 steps even in time they lose half of their spread."""

    def spread(steps, variance):
        schedule = Schedule.from_betas(make_betas(name, 1000), steps)
        x, a = torch.ones(1, 1, dtype=torch.float64), schedule.alpha_bar[-1]
        exact = (variance / (a * variance + 1 - a)).sqrt()
        return (last(dpm_solver(normal_denoiser(schedule, variance), x, schedule)) / exact).item()

    variances = [torch.tensor(v, dtype=torch.float64) for v in (1, 0.1, 0.01, 0.001)]
    even = log_snr_timesteps(make_betas(name, 1000), 20)
    assert [spread(even, variance) for variance in variances] == pytest.approx([1] * 4, abs=0.06)
    assert spread(respaced_timesteps(1000, 20), variances[-1]) < 0.6


@pytest.mark.parametrize("sampler", [ddpm, functools.partial(ddim, eta=1.0)], ids=["ddpm", "ddim, eta 1"])
def test_ancestral_sampling_of_normal_data_has_its_variance(sampler):
    schedule = schedule_of(200)
    x = randn((20_000, 1), generator("cpu", 0))
    x = last(sampler(normal_denoiser(schedule), x.double(), schedule, generator=generator("cpu", 1)))
    assert x.mean().item() == pytest.approx(0, abs=0.02)
    assert x.var().item() == pytest.approx(VARIANCE, rel=0.05)


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance():
    schedule = schedule_of(10)
    start, plain = randn((2, 3, 4, 4), generator("cpu", 0)).double(), normal_denoiser(schedule)

    class Small:
        def with_variance(self, x, t):
            return plain(x, t), schedule.posterior_variance[t].view(-1, 1, 1, 1)

    ancestral = ddpm(Small(), start, schedule, generator("cpu", 1))
    stochastic = ddim(plain, start, schedule, eta=1.0, generator=generator("cpu", 1))
    for (_, x), (_, y) in zip(ancestral, stochastic, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [ddpm, functools.partial(ddim, eta=0.7)], ids=["ddpm", "ddim, eta 0.7"])
def test_noise_is_that_of_the_process(sampler):
    """All noise comes from noise_like: in the mollified space the states stay mollified, with nothing above T."""
    mollifier, schedule, calls = GaussianMollifier(2.0, 16), schedule_of(5), []

    def noise_like(x, source):
        calls.append(source)
        return mollifier.noise_like(x, source)

    source = generator("cpu", 0)
    start = mollifier.noise_like(torch.empty(1, 1, 16, 16), source)
    path = list(sampler(normal_denoiser(schedule), start, schedule, generator=source, noise_like=noise_like))
    assert len(calls) == 4 and all(call is source for call in calls)  # none at the last step
    for _, x in path:
        assert x.diff(dim=-1).diff(dim=-1).diff(dim=-1).std() < 0.5 * x.std()  # white noise has 4.5 std


@pytest.mark.parametrize("sampler", ALL.values(), ids=ALL)
def test_a_sample_depends_on_its_generator_alone(sampler):
    schedule = schedule_of(4)
    start = randn((3, 1, 4, 6), sample_generators("cpu", range(3), "start"))

    def run(indices):
        options = {} if sampler is dpm_solver else {"generator": sample_generators("cpu", indices, "noise")}
        return last(sampler(normal_denoiser(schedule), start[indices].double(), schedule, **options))

    torch.testing.assert_close(run([0, 1, 2])[1:2], run([1]))


@pytest.mark.parametrize("steps, tolerance", [(50, 0.1), (500, 0.01)])
def test_inversion_and_back(steps, tolerance):
    """First order there and back; the state it finds is the one the exact flow has."""
    schedule = schedule_of(steps)
    denoise, tx0 = normal_denoiser(schedule), 0.5 * randn((2, 3, 4, 5), generator("cpu", 0)).double()
    path = list(ddim_invert(denoise, tx0, schedule))
    assert [t for t, _ in path] == list(range(steps))
    x_t = path[-1][1]
    torch.testing.assert_close(exact_path_end(schedule, x_t), tx0, rtol=tolerance, atol=0)
    torch.testing.assert_close(last(ddim(denoise, x_t, schedule)), tx0, rtol=tolerance, atol=0)


def image_diffusion(sampler=None, **options):
    config = autoencoder_config(16)
    for name, value in options.items():
        setattr(config.diffusion if name in config.diffusion else config.model, name, value)
    return build_diffusion(config, 4, sampler)


@pytest.mark.parametrize("name", SAMPLERS["ddpm"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_every_sampler_runs_with_fixed_and_learned_variance(name, learn_sigma):
    diffusion = image_diffusion(name, learn_sigma=learn_sigma)
    coords = Coordinates.full(2, (9, 14))

    def network(values, time):
        return torch.cat([values, values], dim=-1) if learn_sigma else values

    x = diffusion.mollifier.noise_like(torch.empty(2, 3, 9, 14), generator("cpu", 0))
    path = list(sample(diffusion.denoiser(network, coords), x, diffusion, generator("cpu", 1)))
    assert len(path) == 4 and all(x.isfinite().all() and x.shape == (2, 3, 9, 14) for _, x in path)
    assert path[-1][1].abs().max() <= 1
