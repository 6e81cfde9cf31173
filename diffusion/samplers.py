"""Samplers as pure functions in the mollified space: none of them knows what the network predicts.

Common arguments
denoise     (x [B, C, H, W], t int64 [B]) -> estimate of T x_0, like x; images or latents [B, Z] alike
x           the state to start from, T xi unless said otherwise
schedule    diffusion.schedules.Schedule, run from its last step to 0
generator   one torch.Generator, or a list of one per sample
noise_like  (x, generator) -> noise of the process, like x: GaussianMollifier.noise_like for images

Every sampler yields (t, x) after every step: the step taken and the state it led to, so that a caller can show
progress or keep the path. The last state is the estimate of T x_0 itself, of step 0.
"""

import torch

from diffusion.schedules import half_log_snr
from utils.errors import UserError
from utils.rng import randn

SAMPLERS = ("ddpm", "ddim", "dpm_solver")


def white_noise(x, generator=None):
    """Standard normal noise like x."""
    return randn(x.shape, generator, x.device).to(x.dtype)


def ddpm(denoise, x, schedule, generator=None, noise_like=white_noise):
    """Ancestral sampling: x_{t-1} from N(posterior mean, variance T T*) (Ho et al. 2020, algorithm 2).

    The variance is what `denoise` says in its method with_variance (as a Denoiser does: the large or the small one, or
    a learned one per pixel); with any other callable it is the large one, beta_t.
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
    """Deterministic (eta = 0) to ancestral (eta = 1) DDIM (Song et al. 2021, eq. 12 and 16)."""
    if not 0 <= eta <= 1:
        raise UserError(f"--eta={eta} must lie between 0 (deterministic) and 1 (ancestral)")
    for t, a, a_prev in schedule.reversed_pairs():
        x = ddim_step(x, denoise(x, _batch(t, x)), a, a_prev, eta, generator, noise_like)
        yield t, x


def ddim_step(x, x0, a, a_prev, eta=0.0, generator=None, noise_like=white_noise):
    """The state after x, given the estimate x0 of T x_0; a and a_prev are alpha_bar before and after the step."""
    eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    x = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).clamp(min=0).sqrt() * eps
    return x + sigma * noise_like(x, generator) if sigma > 0 else x


def ddim_invert(denoise, x, schedule):
    """DDIM backwards in time, from x = T x_0 to the state of the last step that `ddim` leads back to it.

    T x_0 is taken for the state of step 0, where it is yielded unchanged. Yields (t, state of step t).
    """
    yield 0, x
    for t, a, a_next in schedule.ascending_pairs():
        x0 = denoise(x, _batch(t, x))
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
        yield t + 1, x


def dpm_solver(denoise, x, schedule):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): DDIM's equation with the slope of T x_0 from the step before.

    The first step, without a slope, and the last, whose log signal-to-noise ratio is infinite, are of first order.
    Steps should be about even in that ratio, as those of schedules.log_snr_timesteps are. The slope is followed no
    further than over the length of the step before: of steps even in time, one near 0 is up to five times as long, and
    what the network errs by would be multiplied.
    """
    x0_last = h_last = None
    for t, a, a_prev in schedule.reversed_pairs():
        x0 = denoise(x, _batch(t, x))
        h = half_log_snr(a_prev) - half_log_snr(a)
        slope = 0.0 if x0_last is None or t == 0 else (x0 - x0_last) * (min(h, h_last) / (2 * h_last))
        x = ((1 - a_prev) / (1 - a)).sqrt() * x - a_prev.sqrt() * torch.expm1(-h) * (x0 + slope)
        x0_last, h_last = x0, h
        yield t, x


def check_sampler(name):
    """Raises UserError unless `--sampler` is one of SAMPLERS."""
    if name not in SAMPLERS:
        raise UserError(f"--sampler={name!r} is unknown; use one of {', '.join(SAMPLERS)}")


def sample(name, denoise, x, diffusion, generator=None, eta=0.0):
    """The path of the sampler called `name`, with the schedule and noise of a GaussianDiffusion; eta is for ddim."""
    check_sampler(name)
    schedule, noise_like = diffusion.schedule, diffusion.mollifier.noise_like
    if name == "ddpm":
        return ddpm(denoise, x, schedule, generator, noise_like)
    if name == "ddim":
        return ddim(denoise, x, schedule, eta, generator, noise_like)
    return dpm_solver(denoise, x, schedule)


def _batch(t, x):
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)
