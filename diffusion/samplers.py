"""Samplers as pure functions in the mollified space, independent of what the network predicts (docs/method.md, 5).

Common arguments
denoise     (x [B, C, H, W], t int64 [B]) -> estimate of T x_0, like x; or the same for latents [B, Z]
x           initial state, T xi unless stated otherwise
schedule    diffusion.schedules.Schedule; the loop runs from its last step to 0
generator   one torch.Generator, or a list of one per sample
noise_like  (x, generator) -> noise of the process, like x: GaussianMollifier.noise_like for images

Every sampler yields (t, x) after every step, the step taken and the resulting state, so that a caller can show progress
or keep the path. The last state is the estimate of T x_0 at step 0.
"""

import torch

from diffusion.schedules import half_log_snr
from utils.rng import randn

SAMPLERS = ("ddpm", "ddim", "dpm_solver")


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
    for t, a, a_prev in schedule.reversed_pairs():
        x = ddim_step(x, denoise(x, _batch(t, x)), a, a_prev, eta, generator, noise_like)
        yield t, x


def ddim_step(x, x0, a, a_prev, eta=0.0, generator=None, noise_like=white_noise):
    """The next state, from the estimate x0 of T x_0; a and a_prev are alpha_bar before and after the step."""
    eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    x = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).clamp(min=0).sqrt() * eps
    return x + sigma * noise_like(x, generator) if sigma > 0 else x


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


def sample(name, denoise, x, diffusion, generator=None, eta=0.0):
    """The path of the sampler `name` (one of SAMPLERS) with the schedule and noise of a GaussianDiffusion.

    eta     of ddim; the other samplers ignore it
    """
    schedule, noise_like = diffusion.schedule, diffusion.mollifier.noise_like
    if name == "ddpm":
        return ddpm(denoise, x, schedule, generator, noise_like)
    if name == "ddim":
        return ddim(denoise, x, schedule, eta, generator, noise_like)
    if name == "dpm_solver":
        return dpm_solver(denoise, x, schedule)
    raise ValueError(f"unknown sampler {name!r}; use one of {', '.join(SAMPLERS)}")


def _batch(t, x):
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)
