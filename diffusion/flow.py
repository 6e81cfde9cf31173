"""Flow matching and few-step models in the mollified space (docs/method.md, 8).

The path from noise at time 0 to data at time 1 is a straight line, x_t = t T x_1 + (1 − t) T ξ. The network estimates
its end. With the velocity v(x, t) = E[T x_1 − T ξ | x_t = x] of the flow, the two estimates are

    F(x, t, t) = E[T x_1 | x_t = x] = x + (1 − t) v(x, t)
    F(x, t, r) = x + (1 − t) u(x, t, r), u the average velocity until time r of the trajectory through x at time t

and the trajectory is at x + (r − t) / (1 − t) (F(x, t, r) − x) at time r. Since x_t / (1 − t) has the derivative
F(x_t, t, t) / (1 − t)², F(x, t, r) is the average of F(x_τ, τ, τ) over the trajectory with weights (1 − τ)⁻². It is an
average of expectations of data and may be clipped to their range for every r.

Steps are numbered as in diffusion.schedules: the last one is pure noise, and the state after step 0 is data.
"""

import dataclasses
from collections.abc import Callable

import torch

from data.coordinates import Coordinates
from diffusion.losses import multiscale_loss, prediction_loss
from diffusion.mollifier import GaussianMollifier
from utils.rng import randn


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """Times 1 − (t + 1) / S of the steps t = 0 ... S − 1; the state after step 0 has time 1."""

    steps: int

    def __len__(self):
        return self.steps

    def time(self, t):
        """Time of the steps t, an int or int64 [B]; 1 for the step −1 that follows step 0. Float, or float32 [B]."""
        return 1 - (t + 1) / self.steps

    def levels(self):
        """As Schedule.levels: (t, (time, 1 − time) of step t, the same after it)."""
        for t, now, after in self.reversed_pairs():
            yield t, (now, 1 - now), (after, 1 - after)

    def reversed_pairs(self):
        """(t, time of step t, time after it) from the last step to 0, floats."""
        for t in reversed(range(self.steps)):
            yield t, self.time(t), self.time(t - 1)

    def ascending_pairs(self):
        """(t, time of step t, time of step t + 1) from 0 to the step before the last, floats."""
        for t in range(self.steps - 1):
            yield t, self.time(t), self.time(t + 1)


def straight_path(end, noise, t):
    """x_t = t end + (1 − t) noise, like both [B, ...]; t [B]."""
    t = _expand(t, end)
    return t * end + (1 - t) * noise


def preconditioning(t, data_variance, noise_variance):
    """(c_skip, c_in, c_out) of F = c_skip x + c_out N(c_in x), like t (docs/method.md, 8.2).

    With the pointwise variances v_d of T x_1 and v_n of T ξ, x_t has variance v_t = t² v_d + (1 − t)² v_n. c_skip x_t
    is the best linear estimate of T x_1 from x_t at the same point, and c_out is the standard deviation of its error.
    """
    variance = t**2 * data_variance + (1 - t) ** 2 * noise_variance
    c_out = (1 - t) * (data_variance * noise_variance / variance).sqrt()
    return t * data_variance / variance, variance.rsqrt(), c_out


def jump_target(end, estimate, t, s, r):
    """Regression target of F(x_t, t, r): (1 − κ) end + κ F(x_s, s, r), like end [B, ...] (docs/method.md, 8.3).

    end        T x_1 of the path that x_t and x_s lie on
    estimate   F(x_s, s, r), without gradient
    t, s, r    times t ≤ s ≤ r, each [B]
    κ = (r − s)(1 − t) / ((r − t)(1 − s)) is the weight of the trajectory from s to r in the average F(x, t, r). It is 0
    for s = r, which is flow matching, and 1 for r = 1 > s. Flow matching as well where r = t.
    """
    share = (r - s) * (1 - t) / ((r - t) * (1 - s))
    return torch.lerp(end, estimate, _expand(torch.where((r > t) & (r > s), share, 0), end))


def _expand(t, like):
    return t.view(-1, *[1] * (like.dim() - 1))


@dataclasses.dataclass(eq=False)
class Flow:
    """Flow matching (objective "flow") or a model that jumps ("few_step"), with the interface of GaussianDiffusion.

    schedule              FlowSchedule; every t below is int64 [B] in [0, len(schedule))
    mollifier             diffusion.mollifier.GaussianMollifier, T
    data_variance         pointwise variance of T x_1
    jumps                 the network takes r − t as well, and F(x, t, r) is learnt for r > t
    sampler               jump, euler or heun
    evaluations           of the network that a sample takes; None: one per step
    multiscale_max_size   finest grid of the multiscale loss; None: no multiscale loss
    """

    schedule: FlowSchedule
    mollifier: GaussianMollifier
    data_variance: float
    jumps: bool = False
    sampler: str = "heun"
    evaluations: int | None = None
    multiscale_max_size: int | None = None

    @property
    def num_steps(self):
        return len(self.schedule)

    def with_mollifier(self, mollifier):
        """The same flow with another mollifier."""
        return dataclasses.replace(self, mollifier=mollifier)

    def q_sample(self, x0, t, noise):
        """x_t = T(time x_1 + (1 − time) ξ), like the images x0 = x_1; noise standard normal draws of the same shape."""
        return self.mollifier.blur(straight_path(x0, self.mollifier.scale_noise(noise), self.schedule.time(t)))

    def training_losses(self, model_fn, x0, t, coords, noise=None, generator=None):
        """Losses per sample, a dict of float32 [B].

        model_fn    (values [B, L, C], time float32) -> [B, L, C]; time is [B], 1000 (1 − t), or with jumps [B, 2], that
                    and 100 (r − t)
        x0          images [B, C, H, W] with coords, the Coordinates of the points the network sees; or latents [B, Z]
                    with coords None
        t           int64 [B], steps for flow matching; or float32 [B, 3], times t ≤ s ≤ r for the jump objective, as
                    diffusion.timestep_samplers.JumpTimes draws them
        noise       standard normal draws like x0; drawn from `generator` (one, or a list of one per sample) where None
        Returns "loss", to be minimised, and "mse" of the estimate of T x_1.
        """
        if noise is None:
            noise = randn(x0.shape, generator, x0.device)
        if t.dim() == 1:
            start = between = end = self.schedule.time(t)
        else:
            start, between, end = t.unbind(1)
        ends = [gather(self.mollifier.blur(x), coords) for x in (x0, self.mollifier.scale_noise(noise))]
        target = ends[0]
        if t.dim() == 2:
            with torch.no_grad():
                later = self._estimate(model_fn, straight_path(*ends, between), between, end)
            target = jump_target(target, later, start, between, end)
        estimate = self._estimate(model_fn, straight_path(*ends, start), start, end)

        losses = {"mse": prediction_loss("mse", estimate, target).detach()}
        scale = _expand(self._preconditioning(start)[2], estimate)
        estimate, target = estimate / scale, target / scale
        losses["loss"] = prediction_loss("mse", estimate, target)
        if self.multiscale_max_size is not None:
            losses["loss"] = losses["loss"] + multiscale_loss(estimate, target, coords, self.multiscale_max_size)
        return losses

    def denoiser(self, model_fn, coords, clip=True):
        """The network as a FlowDenoiser; arguments as for GaussianDiffusion.denoiser."""
        return FlowDenoiser(self, model_fn, coords, clip)

    def _preconditioning(self, t):
        return preconditioning(t, self.data_variance, self.mollifier.noise_variance)

    def _estimate(self, model_fn, values, t, r):
        """F(x, t, r) in float32, like values [B, L, C]; t and r [B]."""
        c_skip, c_in, c_out = (_expand(c, values) for c in self._preconditioning(t))
        time = 1000 * (1 - t)
        if self.jumps:
            time = torch.stack([time, 100 * (r - t)], dim=1)
        return c_skip * values + c_out * model_fn(c_in * values, time).to(values.dtype)


@dataclasses.dataclass(eq=False)
class FullNetwork:
    """A network on all pixels, in the process that it was trained for; the arguments of Flow.denoiser."""

    diffusion: object
    model_fn: Callable
    coords: Coordinates | None
    clip: bool

    def __post_init__(self):
        if self.coords is not None and not self.coords.is_full:
            raise ValueError("a denoiser needs every pixel; use Coordinates.full")


class FlowDenoiser(FullNetwork):
    """denoise(x, t) -> F(x, t, t), the estimate of T x_1, like x [B, C, H, W] (or [B, Z]); denoise.jump: F(x, t, r)."""

    def __call__(self, x, t):
        return self._estimate(x, t, t)

    def jump(self, x, t):
        """F(x, t, r), r the time after step t."""
        return self._estimate(x, t, t - 1)

    def _estimate(self, x, t, r):
        flow = self.diffusion
        t, r = (flow.schedule.time(step).to(x.dtype) for step in (t, r))
        estimate = scatter(flow._estimate(self.model_fn, gather(x, self.coords), t, r), self.coords)
        return estimate.clamp(-1, 1) if self.clip else estimate


def gather(image, coords):
    """Values [B, L, C] of an image [B, C, H, W] at the coordinates; latents [B, Z], without coords, unchanged."""
    return image if coords is None else coords.gather(image)


def scatter(values, coords):
    """The image [B, C, H, W] of values [B, L, C] at all its coordinates; latents unchanged."""
    return values if coords is None else coords.scatter(values)
