"""Linear operators A of inverse problems y = A x + n, with n white Gaussian noise (docs/inverse_problems.md).

An operator is any object with three members:

    A(image)            image [B, C, H, W] -> data [B, ...]
    A_adjoint(data)     the adjoint, data -> [B, C, H, W]: <A x, y> = <x, A* y>
    noise               standard deviation of n; 0 for exact data

Operators work in float32, and in float64 for float64 images.
"""

import functools

import torch
import torch.nn.functional as F

from diffusion.mollifier import GaussianMollifier


class Mask:
    """A x = m ⊙ x: known bool [B or 1, 1 or C, H, W] marks the known pixels; the data are 0 elsewhere."""

    def __init__(self, known, noise=0.0):
        self.known = known
        self.noise = noise

    def A(self, image):
        """Images [B, C, H, W] -> [B, C, H, W]."""
        return self.known * image

    A_adjoint = pseudo_inverse = A


class Separable:
    """A x = R x Cᵀ: one matrix for each axis of an image.

    rows, columns   float64 matrices [h, H] and [w, W]
    """

    def __init__(self, rows, columns, noise=0.0):
        self.rows, self.columns = rows, columns
        self.noise = noise

    def A(self, image):
        """Images [..., H, W] -> [..., h, w]."""
        return _separable(self.rows, self.columns, image)

    def A_adjoint(self, data):
        """Data [..., h, w] -> [..., H, W]."""
        return _separable(self.rows.T, self.columns.T, data)

    def pseudo_inverse(self, data):
        """A⁺: the image [..., H, W] with the smallest norm of all that fit data [..., h, w] best."""
        return _separable(*self._inverses, data)

    @functools.cached_property
    def _inverses(self):
        return torch.linalg.pinv(self.rows), torch.linalg.pinv(self.columns)


class Downsampling(Separable):
    """Bicubic resizing with antialiasing, from `size` (H, W) to a smaller `low_size` (h, w)."""

    def __init__(self, size, low_size, noise=0.0, device=None):
        axes = (_resizing(*lengths).to(device) for lengths in zip(size, low_size, strict=True))
        super().__init__(*axes, noise)


class Blur:
    """Gaussian blur of standard deviation `width`, a fraction of each side, with a reflective boundary."""

    def __init__(self, width, noise=0.0):
        self.mollifier = GaussianMollifier(width, 1)  # of an image of one pixel, so that sigma is a fraction
        self.noise = noise

    def A(self, image):
        """Images [..., H, W] -> [..., H, W]."""
        return self.mollifier.blur(image)

    A_adjoint = A


class Projections:
    """Mean values along rows and along columns: two Radon projections, read by `bins` detectors each.

    Detector i of the first projection averages the image over the horizontal band [i, i + 1] / bins of [0, 1]², that
    of the second over the vertical band.
    """

    def __init__(self, size, bins, noise=0.0, device=None):
        bands, means = ([_averaging(length, count).to(device) for length in size] for count in (bins, 1))
        self.views = Separable(bands[0], means[1]), Separable(means[0], bands[1])
        self.bins = bins
        self.noise = noise

    def A(self, image):
        """Images [..., H, W] -> [..., 2, bins]."""
        horizontal, vertical = self.views
        return torch.stack([horizontal.A(image)[..., 0], vertical.A(image)[..., 0, :]], dim=-2)

    def A_adjoint(self, data):
        """Data [..., 2, bins] -> [..., H, W]."""
        horizontal, vertical = self.views
        return horizontal.A_adjoint(data[..., 0, :, None]) + vertical.A_adjoint(data[..., 1, None, :])


class Points:
    """Values at arbitrary positions, by bilinear interpolation between pixel centres, clamped at the border.

    positions   float [B or 1, N, 2], (x, y) in [0, 1]
    size        (H, W)
    """

    def __init__(self, positions, size, noise=0.0):
        self.positions = positions
        self.size = tuple(size)
        self.noise = noise

    def A(self, image):
        """Images [B, C, H, W] -> [B, C, N]."""
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        grid = (2 * self.positions - 1)[:, None].to(image.dtype).expand(len(image), -1, -1, -1)
        with torch.autocast(image.device.type, enabled=False):
            return F.grid_sample(image, grid, padding_mode="border", align_corners=False)[:, :, 0]

    def A_adjoint(self, data):
        """Data [B, C, N] -> [B, C, H, W]."""
        return adjoint_of(self.A, data, (*data.shape[:2], *self.size))


class Channels:
    """An operator applied to some channels of an image with `total` channels.

    channels    their numbers, a list
    """

    def __init__(self, operator, channels, total):
        self.operator, self.channels, self.total = operator, list(channels), total

    @property
    def noise(self):
        """The noise level of the operator."""
        return self.operator.noise

    def A(self, image):
        """Images [B, C, H, W] -> data of the operator."""
        return self.operator.A(image[:, self.channels])

    def A_adjoint(self, data):
        """Data of the operator -> [B, C, H, W], zero in the other channels."""
        part = self.operator.A_adjoint(data)
        image = part.new_zeros(len(part), self.total, *part.shape[-2:])
        image[:, self.channels] = part
        return image


class Stack:
    """All measurements of several operators.

    image_shape     (C, H, W)
    Operators with noise levels of their own are whitened: with s the smallest of them, the measurements of operator i
    are multiplied by s / s_i, so that `noise` is s for all of them.
    """

    def __init__(self, operators, image_shape, device=None):
        self.operators = list(operators)
        self.noise = min(operator.noise for operator in self.operators)
        if self.noise == 0 and any(operator.noise for operator in self.operators):
            raise ValueError("a stack holds operators without noise beside some with noise; give each a positive one")
        self.weights = [self.noise / operator.noise if self.noise else 1.0 for operator in self.operators]
        probe = torch.zeros(1, *image_shape, device=device)
        self.shapes = [operator.A(probe).shape[1:] for operator in self.operators]

    def A(self, image):
        """Images [B, C, H, W] -> [B, M], M measurements in all."""
        return torch.cat([weight * operator.A(image).flatten(1)
                          for operator, weight in zip(self.operators, self.weights, strict=True)], dim=1)

    def A_adjoint(self, data):
        """Data [B, M] -> [B, C, H, W]."""
        parts = data.split([shape.numel() for shape in self.shapes], dim=1)
        return sum(operator.A_adjoint(weight * part.unflatten(1, shape)) for operator, weight, part, shape in
                   zip(self.operators, self.weights, parts, self.shapes, strict=True))


class Physics:
    """A linear physics object of the deepinv package, with A and A_adjoint, as an operator.

    The noise level is the sigma of its noise model or, if that has none, `noise`.
    """

    def __init__(self, physics, noise=0.0):
        self.A, self.A_adjoint = physics.A, physics.A_adjoint
        self.noise = float(getattr(physics.noise_model, "sigma", noise))


def adjoint_of(forward, data, shape):
    """A* data for a linear `forward` that autograd can differentiate; shape is that of the images."""
    with torch.enable_grad():
        image = torch.zeros(shape, dtype=data.dtype, device=data.device, requires_grad=True)
        return torch.autograd.grad(forward(image), image, data)[0]


def pseudo_inverse(operator, data, iterations=100):
    """A⁺ data: by the operator's own method if it has one, else by conjugate gradients, A⁺ = A* (A A*)⁺."""
    if hasattr(operator, "pseudo_inverse"):
        return operator.pseudo_inverse(data)
    return operator.A_adjoint(conjugate_gradients(lambda v: operator.A(operator.A_adjoint(v)), data, iterations))


def conjugate_gradients(matrix, right, iterations=100, tolerance=1e-5):
    """Solution v of `matrix`(v) = right for a symmetric positive semidefinite function of tensors [B, ...].

    Each sample is a system of its own. It stops when all residuals are below `tolerance` times the norm of `right`.
    """
    solution, residual = torch.zeros_like(right), right
    direction, squared = residual, _dot(residual, residual)
    enough = tolerance**2 * squared
    for _ in range(iterations):
        if (squared <= enough).all():
            break
        image = matrix(direction)
        active = squared > enough  # a solved sample keeps its solution: its step would be 0 / 0
        step = torch.where(active, squared / _dot(direction, image).clamp(min=_tiny(right)), 0)
        solution, residual = solution + step * direction, residual - step * image
        before, squared = squared, torch.where(active, _dot(residual, residual), squared)
        direction = residual + squared / before.clamp(min=_tiny(right)) * direction
    return solution


def _dot(a, b):
    """Inner products of the samples, [B, 1, ...] like a."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.dim() - 1))


def _tiny(x):
    return torch.finfo(x.dtype).tiny


def _separable(rows, columns, image):
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    with torch.autocast(image.device.type, enabled=False):
        return rows.to(image.dtype) @ image @ columns.to(image.dtype).T


def _resizing(length, low_length):
    """Matrix [low_length, length] of resizing one axis, float64."""
    pixels = torch.eye(length, dtype=torch.float64)[None, None]  # one column of an image each
    return F.interpolate(pixels, (low_length, length), mode="bicubic", antialias=True)[0, 0]


def _averaging(length, count):
    """Matrix [count, length] of the means over `count` equal intervals of an axis, float64: shares of overlap."""
    pixel, band = torch.arange(length, dtype=torch.float64), torch.arange(count, dtype=torch.float64)[:, None]
    start = torch.maximum(pixel / length, band / count)
    end = torch.minimum((pixel + 1) / length, (band + 1) / count)
    return (end - start).clamp(min=0) * count
