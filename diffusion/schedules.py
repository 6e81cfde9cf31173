"""Noise schedules and the tables of a diffusion chain (docs/method.md, 3.1 and 3.3).

All tables are float64. The cosine schedule reaches alpha_bar = 2.4e-9 and 1 - alpha_bar = 4e-5; float32 would lose
three digits of the latter. Values are cast to float32 only when they are looked up for a batch.
"""

import dataclasses
import functools
import math

import numpy as np
import torch

from utils.errors import UserError

MAX_BETA = 0.999
LOWEST = -5  # of half_log_snr; a state below it carries almost no information about x_0


def make_betas(name, steps, resolution=None):
    """Variances beta_t of the noise added at every step, float64 [steps], each at most 0.999 (docs/method.md, 3.1).

    cosine          alpha_bar(u) = cos²((u + 0.008) / 1.008 · pi / 2) (Nichol and Dhariwal 2021, eq. 17)
    shifted_cosine  cosine with its log SNR moved by 2 log(64 / resolution) (Hoogeboom et al. 2023, eq. 4)
    linear          from 1e-4 to 2e-2, scaled by 1000 / steps
    const0.008      0.008 · 1000 / steps

    resolution      side of the training images in pixels; needed by shifted_cosine only
    Raises UserError for shifted_cosine without a resolution.
    """
    if name == "cosine":
        return _betas_of(_cosine, steps)
    if name == "shifted_cosine":
        if resolution is None:
            raise UserError("diffusion.noise_schedule='shifted_cosine' needs images; use cosine, linear or const0.008")
        shift = 2 * math.log(64 / resolution)
        return _betas_of(lambda u: torch.sigmoid(torch.logit(_cosine(u)) + shift), steps)
    first, last = {"linear": (1e-4, 2e-2), "const0.008": (0.008, 0.008)}[name]
    return (torch.linspace(first, last, steps, dtype=torch.float64) * (1000 / steps)).clamp(max=MAX_BETA)


def _cosine(u):
    return torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _betas_of(alpha_bar, steps):
    """Betas such that the products of 1 - beta follow the function alpha_bar on [0, 1]."""
    values = alpha_bar(torch.arange(steps + 1, dtype=torch.float64) / steps)
    return (1 - values[1:] / values[:-1]).clamp(max=MAX_BETA)


def respaced_timesteps(total, count, flag="--sampling_steps"):
    """`count` evenly spaced steps of 0 ... total - 1: an ascending list of distinct int, first 0, last total - 1.

    A single step is [total - 1], because sampling starts at pure noise.
    Raises UserError, naming `flag`, unless 1 <= count <= total.
    """
    check_count(total, count, flag)
    if count == 1:
        return [total - 1]
    gaps = count - 1
    return [(i * (total - 1) + gaps // 2) // gaps for i in range(count)]  # rounded, in exact arithmetic


def log_snr_timesteps(betas, count, flag="--sampling_steps"):
    """Like respaced_timesteps for a chain with these betas [total], but evenly spaced in half_log_snr.

    The equation that DPM-Solver integrates is smoothest in this variable (Lu et al. 2022). Much of its range lies in
    the few steps before 0, where details appear; 20 steps evenly spaced in time would put too few of them there. One
    step crosses everything below LOWEST, a third of the range of the cosine schedule.
    """
    total = len(betas)
    check_count(total, count, flag)
    noise = -half_log_snr(torch.cumprod(1 - betas, dim=0)).numpy()  # ascending
    wanted = np.linspace(noise[0], min(noise[-1], -LOWEST), count)
    step, place = np.interp(wanted, noise, np.arange(total)).round().astype(int), np.arange(count)
    step = np.maximum.accumulate(step - place) + place  # make steps distinct by moving them up,
    step = np.minimum(step, total - count + place)  # and down where they would leave the chain
    return [*step[:-1].tolist(), total - 1]


def half_log_snr(alpha_bar):
    """log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), the lambda of DPM-Solver; same shape as alpha_bar."""
    return 0.5 * (alpha_bar / (1 - alpha_bar)).log()


def check_count(total, count, flag):
    """UserError unless the number of sampling steps lies between 1 and the steps of the chain."""
    if not 1 <= count <= total:
        raise UserError(f"{flag}={count} must lie between 1 and diffusion.steps={total}")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Tables of a chain of S steps, indexed 0 ... S - 1; float64 [S], stored on the CPU.

    alpha_bar   product of 1 - beta up to and including the step
    timesteps   int64 [S], the corresponding steps of the original chain
    total       number of steps of the original chain
    """

    alpha_bar: torch.Tensor
    timesteps: torch.Tensor
    total: int

    @classmethod
    def from_betas(cls, betas, timesteps=None):
        """The chain with these betas float64 [total], or its restriction to `timesteps` (ascending list)."""
        total = len(betas)
        timesteps = torch.arange(total) if timesteps is None else torch.as_tensor(timesteps)
        return cls(torch.cumprod(1 - betas, dim=0)[timesteps], timesteps, total)

    def __len__(self):
        return len(self.alpha_bar)

    @functools.cached_property
    def alpha_bar_prev(self):
        """alpha_bar of the preceding step; 1 before step 0."""
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    @functools.cached_property
    def betas(self):
        """beta_t between neighbouring steps of this chain."""
        return 1 - self.alpha_bar / self.alpha_bar_prev

    @functools.cached_property
    def sqrt_alpha_bar(self):
        """Coefficient of T x_0 in x_t."""
        return self.alpha_bar.sqrt()

    @functools.cached_property
    def sqrt_one_minus_alpha_bar(self):
        """Coefficient of T xi in x_t."""
        return (1 - self.alpha_bar).sqrt()

    @functools.cached_property
    def posterior_x0(self):
        """Coefficient of T x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.alpha_bar_prev.sqrt() * self.betas / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_xt(self):
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        alphas = self.alpha_bar / self.alpha_bar_prev
        return alphas.sqrt() * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_variance(self):
        """beta~_t; the covariance of q(x_{t-1} | x_t, x_0) is beta~_t T T*. It is 0 at step 0."""
        return (1 - self.alpha_bar_prev) / (1 - self.alpha_bar) * self.betas

    @functools.cached_property
    def variance_small(self):
        """The small fixed variance, beta~_t. Step 0 takes the value of step 1, so that its logarithm exists."""
        first = self.posterior_variance[1:2] if len(self) > 1 else self.betas
        return torch.cat([first, self.posterior_variance[1:]])

    @functools.cached_property
    def variance_large(self):
        """The large fixed variance, beta_t; the small one at step 0 (Nichol and Dhariwal 2021)."""
        return torch.cat([self.variance_small[:1], self.betas[1:]])

    @functools.cached_property
    def network_time(self):
        """The network's time input: the original step, scaled to 0 ... 1000 for any number of steps."""
        return self.timesteps.double() * (1000 / self.total)

    def at(self, name, t, like):
        """The table `name` at the steps t (int64 [B]), [B, 1, ...] to broadcast with `like` [B, ...].

        float64 if `like` is, otherwise float32. Each table is copied to a device once, so a GPU never waits for it.
        """
        values = self._table(name, t.device)[t].to(torch.promote_types(like.dtype, torch.float32))
        return values.view(-1, *[1] * (like.dim() - 1))

    @functools.cached_property
    def _copies(self):
        return {}

    def _table(self, name, device):
        if (name, device) not in self._copies:
            self._copies[name, device] = getattr(self, name).to(device)
        return self._copies[name, device]

    def levels(self):
        """Yield (t, (a, b) of x_t = a T x_0 + b T xi at t, the same at t - 1) from the last step to 0, floats."""
        for t, now, after in self.reversed_pairs():
            yield t, (now.sqrt().item(), (1 - now).sqrt().item()), (after.sqrt().item(), (1 - after).sqrt().item())

    def reversed_pairs(self):
        """Yield (t, alpha_bar at t, alpha_bar at t - 1) from the last step to 0; float64 scalars, 1 before step 0."""
        for t in reversed(range(len(self))):
            yield t, self.alpha_bar[t], self.alpha_bar_prev[t]

    def ascending_pairs(self):
        """Yield (t, alpha_bar at t, alpha_bar at t + 1) for all steps but the last; float64 scalars."""
        for t in range(len(self) - 1):
            yield t, self.alpha_bar[t], self.alpha_bar[t + 1]
