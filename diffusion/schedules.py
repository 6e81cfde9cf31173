"""Noise schedules and the tables of a diffusion chain (METHOD, mollified diffusion).

Every table is float64: with the cosine schedule alpha_bar goes down to 2.4e-9 and 1 - alpha_bar to 4e-5, and float32
would lose three digits of the second. Only what is looked up for a batch is cast to float32.
"""

import dataclasses
import functools
import math

import numpy as np
import torch

from utils.errors import UserError

NOISE_SCHEDULES = ("cosine", "linear", "shifted_cosine", "const0.008")
MAX_BETA = 0.999
LOWEST = -5  # of half_log_snr: a state below says next to nothing of x_0


def make_betas(name, steps, resolution=None):
    """Variances beta_t of the noise added at every step, float64 [steps], each at most 0.999.

    cosine          alpha_bar(u) = cos²((u + 0.008) / 1.008 · pi / 2) (Nichol and Dhariwal 2021, eq. 17)
    shifted_cosine  its log signal-to-noise ratio moved by 2 log(64 / resolution) (Hoogeboom et al. 2023, eq. 4)
    linear          1e-4 to 2e-2, both times 1000 / steps
    const0.008      0.008 · 1000 / steps

    resolution      side of the training images in pixels, for shifted_cosine alone
    Raises UserError for an unknown name, and for shifted_cosine without a resolution.
    """
    if name == "cosine":
        return _betas_of(_cosine, steps)
    if name == "shifted_cosine":
        if resolution is None:
            raise UserError("diffusion.noise_schedule='shifted_cosine' needs images; use cosine, linear or const0.008")
        shift = 2 * math.log(64 / resolution)
        return _betas_of(lambda u: torch.sigmoid(torch.logit(_cosine(u)) + shift), steps)
    scale = 1000 / steps
    if name == "linear":
        betas = torch.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=torch.float64)
    elif name == "const0.008":
        betas = torch.full((steps,), scale * 0.008, dtype=torch.float64)
    else:
        raise UserError(f"diffusion.noise_schedule={name!r} is unknown; use one of {', '.join(NOISE_SCHEDULES)}")
    return betas.clamp(max=MAX_BETA)


def _cosine(u):
    return torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _betas_of(alpha_bar, steps):
    """Betas whose products of 1 - beta follow the function alpha_bar on [0, 1]."""
    values = alpha_bar(torch.arange(steps + 1, dtype=torch.float64) / steps)
    return (1 - values[1:] / values[:-1]).clamp(max=MAX_BETA)


def respaced_timesteps(total, count, flag="--sampling_steps"):
    """`count` of the steps 0 ... total - 1, evenly spaced: an ascending list of distinct int, first 0, last total - 1.

    A single step is the last one, [total - 1], because sampling starts at pure noise.
    Raises UserError, about the flag that `count` is from, unless 1 <= count <= total.
    """
    _check_count(total, count, flag)
    if count == 1:
        return [total - 1]
    gaps = count - 1
    return [(i * (total - 1) + gaps // 2) // gaps for i in range(count)]  # rounded, in exact arithmetic


def log_snr_timesteps(betas, count, flag="--sampling_steps"):
    """As respaced_timesteps, of the chain with the betas [total], but even in half_log_snr.

    In it the equation that DPM-Solver integrates is the smoothest (Lu et al. 2022). Much of its range lies in the few
    steps before 0, where details appear: of 20 steps even in time too few would be there. What is below LOWEST, a third
    of the range of the cosine schedule, is crossed by one step from pure noise.
    """
    total = len(betas)
    _check_count(total, count, flag)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    noise = -half_log_snr(alpha_bar).numpy()  # ascending
    wanted = np.linspace(noise[0], min(noise[-1], -LOWEST), count)
    step, place = np.interp(wanted, noise, np.arange(total)).round().astype(int), np.arange(count)
    step = np.maximum.accumulate(step - place) + place  # distinct, each moved up as far as needed,
    step = np.minimum(step, total - count + place)  # and down again where there is no room
    return [*step[:-1].tolist(), total - 1]


def half_log_snr(alpha_bar):
    """log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), "lambda" of DPM-Solver; like alpha_bar."""
    return 0.5 * (alpha_bar / (1 - alpha_bar)).log()


def _check_count(total, count, flag):
    if not 1 <= count <= total:
        raise UserError(f"{flag}={count} must lie between 1 and diffusion.steps={total}")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Tables of a chain of S steps, indexed by its own steps 0 ... S - 1; all float64 [S] and kept on the CPU.

    alpha_bar   products of 1 - beta up to and including the step
    timesteps   int64 [S], the step of the original chain that each one is
    total       the number of steps of the original chain
    """

    alpha_bar: torch.Tensor
    timesteps: torch.Tensor
    total: int

    @classmethod
    def from_betas(cls, betas, timesteps=None):
        """Chain with the betas float64 [total], or the part of it that visits only `timesteps` (ascending list)."""
        total = len(betas)
        timesteps = torch.arange(total) if timesteps is None else torch.as_tensor(timesteps)
        return cls(torch.cumprod(1 - betas, dim=0)[timesteps], timesteps, total)

    def __len__(self):
        return len(self.alpha_bar)

    @functools.cached_property
    def alpha_bar_prev(self):
        """alpha_bar of the step before; 1 before the first."""
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    @functools.cached_property
    def betas(self):
        """beta_t between neighbouring steps of this chain."""
        return 1 - self.alpha_bar / self.alpha_bar_prev

    @functools.cached_property
    def sqrt_alpha_bar(self):
        """Factor of T x_0 in x_t."""
        return self.alpha_bar.sqrt()

    @functools.cached_property
    def sqrt_one_minus_alpha_bar(self):
        """Factor of T xi in x_t."""
        return (1 - self.alpha_bar).sqrt()

    @functools.cached_property
    def posterior_x0(self):
        """Factor of T x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.alpha_bar_prev.sqrt() * self.betas / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_xt(self):
        """Factor of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        alphas = self.alpha_bar / self.alpha_bar_prev
        return alphas.sqrt() * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_variance(self):
        """beta~_t: the covariance of q(x_{t-1} | x_t, x_0) is beta~_t T T*; 0 at step 0."""
        return (1 - self.alpha_bar_prev) / (1 - self.alpha_bar) * self.betas

    @functools.cached_property
    def variance_small(self):
        """The small fixed variance: beta~_t, with step 1's at step 0, where a logarithm of it has to exist."""
        first = self.posterior_variance[1:2] if len(self) > 1 else self.betas
        return torch.cat([first, self.posterior_variance[1:]])

    @functools.cached_property
    def variance_large(self):
        """The large fixed variance: beta_t, and the small one at step 0 (Ho et al. 2020; Nichol and Dhariwal 2021)."""
        return torch.cat([self.variance_small[:1], self.betas[1:]])

    @functools.cached_property
    def network_time(self):
        """What the network is told: the original step on the scale 0 ... 1000, whatever the number of steps."""
        return self.timesteps.double() * (1000 / self.total)

    def at(self, name, t, like):
        """The table `name` at the steps t (int64 [B]), [B, 1, ...] to broadcast with `like` [B, ...].

        In float32, or in float64 where `like` is. Makes no GPU wait: a table travels to a device once.
        """
        values = self._table(name, t.device)[t].to(torch.promote_types(like.dtype, torch.float32))
        return values.view(-1, *[1] * (like.dim() - 1))

    @functools.cached_property
    def _moved(self):
        return {}

    def _table(self, name, device):
        if (name, device) not in self._moved:
            self._moved[name, device] = getattr(self, name).to(device)
        return self._moved[name, device]

    def reversed_pairs(self):
        """(t, alpha_bar at t, at the step before) from the last step to 0; float64 scalars, 1 before step 0."""
        for t in reversed(range(len(self))):
            yield t, self.alpha_bar[t], self.alpha_bar_prev[t]

    def ascending_pairs(self):
        """(t, alpha_bar at t, at the step after) from 0 to the step before the last; float64 scalars."""
        for t in range(len(self) - 1):
            yield t, self.alpha_bar[t], self.alpha_bar[t + 1]
