"""Samplers as pure functions in the mollified space, independent of what the network predicts (docs/method.md, 5 and
8.4).

Common arguments
denoise     (x [B, C, H, W], t int64 [B]) -> estimate of T x_0, like x; or the same for latents [B, Z]
x           initial state, T xi unless stated otherwise
schedule    diffusion.schedules.Schedule, for solvers of flows diffusion.flow.FlowSchedule; the loop runs from its last
            step to 0
generator   one torch.Generator, or a list of one per sample
noise_like  (x, generator) -> noise of the process, like x: GaussianMollifier.noise_like for images

Every sampler yields (t, x) after every step, the step taken and the resulting state, so that a caller can show progress
or keep the path. The last state is the estimate of T x_0 at step 0.
"""

import torch

from diffusion.schedules import half_log_snr
from utils.rng import randn

SAMPLERS = {  # by diffusion.objective; the first is the default
    "ddpm": ("ddim", "ddpm", "dpm_solver"),
    "flow": ("heun", "euler"),
    "few_step": ("jump", "heun", "euler"),
}
FIRST_ORDER = {"ddpm": "ddim", "flow": "euler", "few_step": "euler"}  # one evaluation a step, of F(x, t, t)
NAMES = tuple(dict.fromkeys(name for names in SAMPLERS.values() for name in names))


def white_noise(x, generator=None):
    """Standard normal noise like x."""
    return randn(x.shape, generator, x.device).to(x.dtype)


def ddpm(denoise, x, schedule, generator=None, noise_like=white_noise):
    """Ancestral sampling: x_{t-1} from N(posterior mean, variance T T*) (docs/method.md, 5.1; Ho et al. 2020, alg. 2).

    The variance comes from denoise.with_variance (see Denoiser) if there is one, and is the large one, beta_t, if not.
    """
    with_variance = getattr(denoise, "with_variance", None)
    for t, _, _ in schedule.reversed_pairs():
        if with_variance is None:
            x0, variance = denoise(x, _batch(t, x)), schedule.variance_large[t]
        else:
            x0, variance = with_variance(x, _batch(t, x))
        x = schedule.posterior_x0[t] * x0 + schedule.posterior_xt[t] * x
        if t > 0:
            x = x + variance.sqrt() * noise_like(x, generator)
        yield t, x


def ddim(denoise, x, schedule, eta=0.0, generator=None, noise_like=white_noise):
    """DDIM, from deterministic (eta = 0) to ancestral (eta = 1) (docs/method.md, 5.2; Song et al. 2021, eq. 12, 16)."""
    for t, now, after in schedule.levels():
        x = ddim_step(x, denoise(x, _batch(t, x)), now, after, eta, generator, noise_like)
        yield t, x


def ddim_step(x, x0, now, after, eta=0.0, generator=None, noise_like=white_noise):
    """The next state, from the estimate x0 of T x_0.

    now, after  (a, b) of x_t = a T x_0 + b T xi before and after the step, floats. Euler's step of a flow is the same.
    """
    (a, b), (a_after, b_after) = now, after
    eps = (x - a * x0) / b
    sigma = eta * b_after / b * fresh_noise(after, now)
    x = a_after * x0 + max(b_after**2 - sigma**2, 0.0) ** 0.5 * eps
    return x + sigma * noise_like(x, generator) if sigma > 0 else x


def fresh_noise(low, high):
    """Standard deviation of the noise that leads from the level `low` (a, b), scaled by a_high / a, to `high`."""
    (a, b), (a_high, b_high) = low, high
    return max(b_high**2 - (a_high / a * b) ** 2, 0.0) ** 0.5


def ddim_invert(denoise, x, schedule):
    """DDIM backwards in time: from x = T x_0 to the state of the last step that `ddim` maps back to it (5.2).

    T x_0 serves as the state of step 0, which is yielded first. Yields (t, state of step t).
    """
    yield 0, x
    for t, a, a_next in schedule.ascending_pairs():
        x0 = denoise(x, _batch(t, x))
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
        yield t + 1, x


def dpm_solver(denoise, x, schedule):
    """DPM-Solver++(2M): DDIM with the slope of T x_0 from the preceding step (docs/method.md, 5.3; Lu et al. 2022,
    alg. 2).

    The first step, which has no slope, and the last, whose log SNR is infinite, are of first order. Steps should be
    about even in the log SNR (schedules.log_snr_timesteps). The slope is extrapolated at most over the length of the
    preceding step: with steps even in time, one near 0 is up to five times as long and would amplify network errors.
    """
    x0_last = h_last = None
    for t, a, a_prev in schedule.reversed_pairs():
        x0 = denoise(x, _batch(t, x))
        h = half_log_snr(a_prev) - half_log_snr(a)
        slope = 0.0 if x0_last is None or t == 0 else (x0 - x0_last) * (min(h, h_last) / (2 * h_last))
        x = ((1 - a_prev) / (1 - a)).sqrt() * x - a_prev.sqrt() * torch.expm1(-h) * (x0 + slope)
        x0_last, h_last = x0, h
        yield t, x


def advance(x, estimate, t, r):
    """State at time r of the trajectory through x at time t, from F(x, t, r). Euler's step, from F(x, t, t)."""
    return x + (r - t) / (1 - t) * (estimate - x)


def velocity(x, estimate, t):
    """v(x, t) from F(x, t, t)."""
    return (estimate - x) / (1 - t)


def euler(denoise, x, schedule):
    """Euler's method. Yields (t, x) after every step, like all samplers.

    denoise    (x [B, ...], t int64 [B]) -> F(x, t, t); the last state is the last estimate
    """
    for t, now, after in schedule.reversed_pairs():
        x = advance(x, denoise(x, _batch(t, x)), now, after)
        yield t, x


def heun(denoise, x, schedule, evaluations=None):
    """Heun's method, of second order; the last step is one of Euler's, because v is not estimated at time 1.

    evaluations   of `denoise` in all, S to 2 S − 1 in S steps: only so many steps are corrected, the first ones. None:
                  all but the last
    Yields (t, x) after every evaluation: the state of Euler's step first, then the corrected one.
    """
    corrected = len(schedule) - 1 if evaluations is None else evaluations - len(schedule)
    for t, now, after in schedule.reversed_pairs():
        first = denoise(x, _batch(t, x))
        predicted = advance(x, first, now, after)
        yield t, predicted
        if len(schedule) - t > corrected:
            x = predicted
            continue
        slope = velocity(predicted, denoise(predicted, _batch(t - 1, x)), after)
        x = x + (after - now) / 2 * (velocity(x, first, now) + slope)
        yield t, x


def euler_invert(denoise, x, schedule):
    """Euler's method backwards, from x = T x_1 to the state of the last step, pure noise.

    At time 1 the velocity is x itself, because T ξ has mean 0: the first step needs no evaluation.
    Yields (t, state of step t), from t = 0.
    """
    x = schedule.time(0) * x
    yield 0, x
    for t, now, before in schedule.ascending_pairs():
        x = advance(x, denoise(x, _batch(t, x)), now, before)
        yield t + 1, x


def heun_invert(denoise, x, schedule):
    """Heun's method backwards, likewise. Yields (t, state of step t) after the evaluations that it takes."""
    slope, now = x, 1.0
    for t in range(len(schedule)):
        time = schedule.time(t)
        predicted = x + (time - now) * slope
        other = velocity(predicted, denoise(predicted, _batch(t, x)), time)
        x = x + (time - now) / 2 * (slope + other)
        yield t, x
        if t + 1 < len(schedule):
            slope, now = velocity(x, denoise(x, _batch(t, x)), time), time


def sample(denoise, x, diffusion, generator=None, eta=0.0):
    """The path of diffusion.sampler, with the schedule and noise of a GaussianDiffusion or Flow.

    eta     of ddim; the other samplers ignore it
    """
    schedule, noise_like = diffusion.schedule, diffusion.mollifier.noise_like
    match diffusion.sampler:
        case "ddim":
            return ddim(denoise, x, schedule, eta, generator, noise_like)
        case "ddpm":
            return ddpm(denoise, x, schedule, generator, noise_like)
        case "dpm_solver":
            return dpm_solver(denoise, x, schedule)
        case "jump":
            return euler(denoise.jump, x, schedule)
        case "euler":
            return euler(denoise, x, schedule)
        case "heun":
            return heun(denoise, x, schedule, diffusion.evaluations)


def invert(denoise, x, diffusion):
    """The path backwards from x = T x_0 that diffusion.sampler, if deterministic, retraces; jumps by Heun's method."""
    inversion = {"jump": heun_invert, "heun": heun_invert, "euler": euler_invert}.get(diffusion.sampler, ddim_invert)
    return inversion(denoise, x, diffusion.schedule)


def _batch(t, x):
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)
