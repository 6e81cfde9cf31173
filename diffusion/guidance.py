"""Sampling images of which something is known: some pixels (inpainting), or a smaller version (super-resolution).

What is known is A x_0 = y for a linear A with pseudo-inverse A⁺. States are mollified, and x_0 is the Wiener filter W
of T x_0, so an estimate T x̂_0 has to change by

    gap = T A⁺(y − A W T x̂_0),

which is T x̄ − T x̂_0 for the image x̄ that agrees with the data and, where they say nothing, with the estimate: T
spreads the pixels, but no unknown one enters.
"""

import torch
import torch.nn.functional as F

from diffusion.samplers import ddim_step, white_noise


class KnownPixels:
    """A = A⁺ = m ⊙: known bool [B, 1, H, W] is the mask m of the known pixels, y an image with those and zeros."""

    def __init__(self, known):
        self.known = known

    def forward(self, image):
        """A of images [B, C, H, W]."""
        return self.known * image

    pseudo_inverse = forward


class Downsampling:
    """A: bicubic resizing from `size` (H, W) to a smaller `low_size` (h, w), with antialiasing.

    It is F.interpolate as one matrix per axis, D_h x D_wᵀ, so that A⁺ is exact as well.
    """

    def __init__(self, size, low_size, device=None):
        self.axes = [_resizing(*lengths, device) for lengths in zip(size, low_size, strict=True)]
        self.inverses = [torch.linalg.pinv(axis) for axis in self.axes]

    def forward(self, image):
        """A of images [..., H, W] -> [..., h, w]; float32 also under autocast."""
        return _separable(self.axes, image)

    def pseudo_inverse(self, low):
        """The smallest images [..., H, W] that `forward` takes to [..., h, w]."""
        return _separable(self.inverses, low)


class Constraint:
    """A x_0 = y in the mollified space.

    operator   KnownPixels or Downsampling: A and A⁺
    data       y, float32, as operator.forward returns it
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
        """A⁺A of an image [B, C, H, W], the part that the data say something about: m ⊙ it, of known pixels."""
        return self.operator.pseudo_inverse(self.operator.forward(image))

    def enforce(self, image, iterations=20):
        """The image [B, C, H, W], in [−1, 1], made to agree with the data: projected on both sets in turn."""
        for _ in range(iterations):
            image = (image + self._missing(image)).clamp(-1, 1)
        return image

    def _missing(self, image):
        return self.operator.pseudo_inverse(self.data - self.operator.forward(image))


class Consistent:
    """A Denoiser whose estimates meet a constraint: T x̂_0 + weight · gap, for any sampler (weight 0 to 1).

    With weight 1 the data's part of every estimate is that of the data (the null-space method of Wang et al. 2023).
    """

    def __init__(self, denoise, constraint, weight=1.0):
        self.denoise = denoise
        self.constraint = constraint
        self.weight = weight

    def __call__(self, x, t):
        return self._corrected(self.denoise(x, t))

    def with_variance(self, x, t):
        """The same, with the variance of the Denoiser."""
        estimate, variance = self.denoise.with_variance(x, t)
        return self._corrected(estimate), variance

    def _corrected(self, tx0):
        return tx0 + self.weight * self.constraint.gap(tx0)


def guided_ddim(
    denoise, x, schedule, constraint, guidance, consistency=0.0, jumps=0, generator=None, noise_like=white_noise
):
    """DDIM with reconstruction guidance (METHOD, applications) and resampling; yields (t, x) as samplers do.

        x_{t−1} ← x_{t−1} − λ ∇_{x_t} ‖m ⊙ (T x̂_0(x_t, t) − T x̄)‖²

    constraint   Constraint: what is known
    guidance     λ, up to step 0, whose state is the estimate itself as in every sampler; 0 does without the gradient,
                 which costs twice an evaluation of the network
    consistency  weight of the gap that the estimate is corrected by before the step, as in Consistent; not in the
                 gradient, which would vanish with it
    jumps        after each step but the last, so many times back to x_t with fresh noise and down again, so that what
                 is unknown gets in tune with what is known (RePaint, Lugmayr et al. 2022)
    """
    for t, a, a_prev in schedule.reversed_pairs():
        for remaining in reversed(range(1 + (jumps if t > 0 else 0))):
            time = torch.full((len(x),), t, device=x.device)
            x0, push = _push(denoise, x, time, constraint, guidance if t > 0 else 0.0, a_prev)
            if consistency:
                x0 = x0 + consistency * constraint.gap(x0)
            x = ddim_step(x, x0, a, a_prev) - push
            if remaining:
                x = (a / a_prev).sqrt() * x + (1 - a / a_prev).sqrt() * noise_like(x, generator)
        yield t, x


def _push(denoise, x, t, constraint, guidance, a_prev):
    """(T x̂_0, what guidance subtracts from x_{t−1}), both like x.

    The gradient of ‖m ⊙ (T x̂_0 − T x̄)‖² holds T x̄ fixed. Two things keep the state one of the process. The gradient is
    that in the space of states x_t = T u: T T* of the one in pixels, which would add what T has not, for W to magnify.
    And its norm is at most that of sqrt(alpha_bar_{t−1}) gap, the change that closes the gap: an estimate is
    (x_t − b f) / a with a = 5e-5 at the first step, and so is its slope.
    """
    if guidance == 0:
        return denoise(x, t), 0.0
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, t)
        gap = constraint.gap(x0.detach())
        gradient, = torch.autograd.grad(x0, x, -2 * constraint.project(gap))
    push = guidance * constraint.mollifier.blur(constraint.mollifier.blur(gradient))
    longest = a_prev.sqrt() * _norm(gap)
    return x0.detach(), push * (longest / _norm(push).clamp(min=torch.finfo(x.dtype).tiny)).clamp(max=1)


def _norm(x):
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


def _separable(axes, image):
    rows, columns = (axis.to(image.dtype) for axis in axes)
    with torch.autocast(image.device.type, enabled=False):
        return rows @ image @ columns.T


def _resizing(length, low_length, device):
    """Matrix [low_length, length] of resizing one axis, float64: what resizing does to each pixel alone."""
    pixels = torch.eye(length, dtype=torch.float64)[None, None]  # one column of an image each
    return F.interpolate(pixels, (low_length, length), mode="bicubic", antialias=True)[0, 0].to(device)
