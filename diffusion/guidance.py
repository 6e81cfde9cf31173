"""Sampling under linear constraints, such as known pixels (inpainting) or a smaller version (super-resolution).

The constraint is A x_0 = y for a linear operator A with pseudo-inverse A⁺ (docs/method.md, 6). States are mollified,
and x_0 is the Wiener filter W of T x_0, so an estimate T x̂_0 has to change by

    gap = T A⁺(y − A W T x̂_0).

This is T x̄ − T x̂_0. The image x̄ agrees with the data, and with the estimate where there are no data. T spreads pixels,
but no unknown pixel enters.
"""

import torch

from diffusion.operators import pseudo_inverse
from diffusion.samplers import ddim_step, fresh_noise, white_noise


class Constraint:
    """A x_0 = y in the mollified space.

    operator   A (diffusion.operators)
    data       y, float32, in the shape of operator.A's result
    mollifier  diffusion.mollifier.GaussianMollifier, T
    """

    def __init__(self, operator, data, mollifier):
        self.operator = operator
        self.data = data
        self.mollifier = mollifier

    def gap(self, tx0):
        """T A⁺(y − A W T x̂_0), like the estimate tx0 [B, C, H, W] of T x_0."""
        return self.mollifier.blur(self._missing(self.mollifier.sharpen(tx0)))

    def project(self, image):
        """A⁺A of an image [B, C, H, W], the part that the data determine; for known pixels, m ⊙ image."""
        return pseudo_inverse(self.operator, self.operator.A(image))

    def misfit_gradient(self, tx0):
        """∇ ‖y − A W T x̂_0‖² with respect to the estimate tx0 of T x_0, like it."""
        residual = self.data - self.operator.A(self.mollifier.sharpen(tx0))
        return -2 * self.mollifier.sharpen(self.operator.A_adjoint(residual))

    def enforce(self, image, iterations=20):
        """The image [B, C, H, W] made to agree with the data within [−1, 1], by alternating projections."""
        for _ in range(iterations):
            image = (image + self._missing(image)).clamp(-1, 1)
        return image

    def _missing(self, image):
        return pseudo_inverse(self.operator, self.data - self.operator.A(image))


class Consistent:
    """A Denoiser for any sampler whose estimates meet a constraint: T x̂_0 + weight · gap, weight in [0, 1]
    (docs/method.md, 6.2).

    Weight 1 replaces the part of the estimate that the data determine (null-space method, Wang et al. 2023).
    """

    def __init__(self, denoise, constraint, weight=1.0):
        self.denoise = denoise
        self.constraint = constraint
        self.weight = weight

    def __call__(self, x, t):
        return self._corrected(self.denoise(x, t))

    def with_variance(self, x, t):
        """The corrected estimate, and the variance of the Denoiser."""
        estimate, variance = self.denoise.with_variance(x, t)
        return self._corrected(estimate), variance

    def jump(self, x, t):
        """The corrected estimate of a jump."""
        return self._corrected(self.denoise.jump(x, t))

    def _corrected(self, tx0):
        return tx0 + self.weight * self.constraint.gap(tx0)


def guided_ddim(
    denoise, x, schedule, constraint, guidance, limited=False, consistency=0.0, jumps=0, generator=None,
    noise_like=white_noise
):
    """DDIM with reconstruction guidance and resampling (docs/method.md, 6.1); yields (t, x) like all samplers.

        x_{t−1} ← x_{t−1} − λ ∇_{x_t} ‖m ⊙ (T x̂_0(x_t, t) − T x̄)‖²         the paper's rule
        x_{t−1} ← x_{t−1} − λ c T T* ∇_{x_t} ‖y − A W T x̂_0(x_t, t)‖²       if limited

    constraint   Constraint
    guidance     λ, not applied at step 0, whose state is the estimate itself; 0 skips the gradient, which costs twice
                 an evaluation of the network
    limited      diffusion posterior sampling (Chung et al. 2023) with two measures that keep the state in the process
                 (see _push)
    consistency  weight of the gap added to the estimate before the step, as in Consistent; the gradient is that of the
                 uncorrected estimate
    jumps        repetitions of every step but the last: back to x_t with fresh noise and down again, which harmonises
                 unknown with known parts (RePaint, Lugmayr et al. 2022)
    """
    for t, now, after in schedule.levels():
        for remaining in reversed(range(1 + (jumps if t > 0 else 0))):
            time = torch.full((len(x),), t, device=x.device)
            x0, push = _push(denoise, x, time, constraint, guidance if t > 0 else 0.0, limited, after[0])
            if consistency:
                x0 = x0 + consistency * constraint.gap(x0)
            x = ddim_step(x, x0, now, after) - push
            if remaining:
                x = now[0] / after[0] * x + fresh_noise(after, now) * noise_like(x, generator)
        yield t, x


def _push(denoise, x, t, constraint, guidance, limited, signal):
    """(T x̂_0, the term that guidance subtracts from x_{t−1}), both like x.

    The gradient of the paper's rule treats T x̄ as constant. If limited, c T T*, the covariance of the noise c^½ T ξ of
    states, maps the gradient with respect to pixels to the space of states, since the Wiener filter would amplify
    anything outside it. And the norm is limited to that of a_{t−1} gap, the change that closes the gap, because the
    slope of the estimate (x_t − b f) / a is huge at the first steps, where a is 5e-5.
    """
    if guidance == 0:
        return denoise(x, t), 0.0
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, t)
        gap = constraint.gap(x0.detach())
        slope = constraint.misfit_gradient(x0.detach()) if limited else -2 * constraint.project(gap)
        gradient, = torch.autograd.grad(x0, x, slope)
    if not limited:
        return x0.detach(), guidance * gradient
    push = guidance * gradient
    for _ in range(2):
        push = constraint.mollifier.scale_noise(constraint.mollifier.blur(push))
    longest = signal * _norm(gap)
    return x0.detach(), push * (longest / _norm(push).clamp(min=torch.finfo(x.dtype).tiny)).clamp(max=1)


def _norm(x):
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
