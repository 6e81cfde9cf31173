"""Mollified white noise as one function over [0, 1]², so that a sample starts from the same noise at every resolution.

In the orthonormal basis psi_k1(y) psi_k2(x) of functions over [0, 1]², psi_0 = 1 and psi_k(u) = sqrt(2) cos(pi k u),
the coefficients of white noise are independent and standard normal, and T multiplies them by
exp(-(pi² sigma² / 2)(k1² / R_h² + k2² / R_w²)). At the pixel centres of an H×W image the functions with k1 < H and
k2 < W are the DCT-II: T xi of that image is the sum over those, with the same coefficients whatever its size.

The mollifier T: a Gaussian blur that turns white noise into a function (METHOD, the mollifier T).

T multiplies coefficient (k1, k2) of the two-dimensional DCT-II of an H×W image, which carries the half-sample
symmetric boundary, by exp(-(pi² sigma² / 2)(k1² / H² + k2² / W²)), sigma in pixels of that image. Both the transform
and the factor separate into rows and columns, so T x = A_h x A_w with one symmetric matrix per axis.
"""

import functools
import math

import torch

from utils import rng
from utils.errors import UserError
from utils.rng import randn

NEGLIGIBLE = 1e-8  # factor of T below which a coefficient is left out: float32 would not show it


def coefficients(lead, count, block, generator=None, device=None):
    """The first count = (rows, columns) standard normal coefficients of white noise, float32 [*lead, rows, columns].

    Each is a function of its place and its sample's generator: a larger count adds coefficients and changes none.
    Those of `block` = (R_h, R_w), the training resolution, are drawn from the generator itself, and all others, one
    such block after another, from a second stream that the generator seeds. So it moves on by the same whatever the
    count, and the noise that a sampler adds in later steps is shared by all sizes too.
    lead        (batch, channels)
    generator   one torch.Generator, or a list of one per sample
    """
    first = rng.randn((*lead, *block), generator, device)
    seed = rng.draw_seed(generator, device)
    blocks = [-(-wanted // length) for wanted, length in zip(count, block, strict=True)]
    detail = rng.seeded(seed) if max(blocks) > 1 else None
    canvas = first.new_zeros(*lead, blocks[0] * block[0], blocks[1] * block[1])
    for i, j in _shells(max(blocks)):
        drawn = first if i == j == 0 else rng.randn(first.shape, detail, device)
        if i < blocks[0] and j < blocks[1]:
            canvas[..., i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] = drawn
    return canvas[..., : count[0], : count[1]]


def _shells(count):
    """Places (i, j) with i, j < count, in order of the larger of the two: those of a larger count come last."""
    return sorted(((i, j) for i in range(count) for j in range(count)), key=lambda place: (max(place), place))


def significant(length, width):
    """How many coefficients of an axis of `length` pixels matter; width is sigma as a fraction of the axis."""
    return math.ceil(min(length, math.sqrt(-2 * math.log(NEGLIGIBLE)) / (math.pi * width)))


def mollified_cosines(position, count, width, scale):
    """Values scale · exp(-(pi width k)² / 2) psi_k(u) for positions u float64 [n] and k < count, [n, count]."""
    k = torch.arange(count, dtype=torch.float64)
    basis = torch.cos(math.pi * position[:, None] * k) * math.sqrt(2)
    basis[:, 0] = 1
    return basis * torch.exp(-0.5 * (math.pi * width * k) ** 2) * scale


class GaussianMollifier:
    """T and its regularised inverse, one operator on functions over [0, 1]² at any image size.

    sigma       standard deviation in pixels at the training resolution; 0 makes T the identity
    train_size  the training resolution, R or (H, W); may be None for sigma = 0
    wiener_eps  epsilon of the Wiener filter

    All methods take and return tensors [..., H, W] and work in float32 (float64 stays float64), also under autocast.
    With sigma = 0 they take tensors of any shape, so that the diffusion of latents [B, Z] is the same code.
    """

    def __init__(self, sigma, train_size=None, wiener_eps=0.05):
        if sigma < 0:
            raise UserError(f"diffusion.gaussian_filter_std={sigma} must be 0 (no mollifier) or positive")
        if sigma > 0 and train_size is None:
            raise ValueError("a mollifier with sigma > 0 needs the training resolution")
        self.sigma = float(sigma)
        self.train_size = (train_size, train_size) if isinstance(train_size, int) else train_size
        self.wiener_eps = wiener_eps

    @property
    def is_identity(self):
        return self.sigma == 0

    def blur(self, x):
        """T x."""
        x = _at_least_float32(x)
        if self.is_identity:
            return x
        rows, columns = self._per_axis(_blur_matrix, x)
        with torch.autocast(x.device.type, enabled=False):
            return rows @ x @ columns

    def sharpen(self, x):
        """The Wiener filter G / (G² + eps²) per DCT coefficient, G that of T: T's inverse where T keeps anything."""
        x = _at_least_float32(x)
        if self.is_identity:
            return x
        rows, columns = (dct_matrix(length, x.device, x.dtype) for length in x.shape[-2:])
        attenuation = torch.outer(*self._per_axis(_attenuation, x))
        gain = attenuation / (attenuation**2 + self.wiener_eps**2)
        with torch.autocast(x.device.type, enabled=False):
            return rows.T @ (gain * (rows @ x @ columns.T)) @ columns

    def scale_noise(self, draws):
        """White noise xi of the size of `draws` from standard normal draws: sqrt(s_h s_w) times them.

        s is the size relative to the training resolution: averaged over a pixel, white noise has variance 1 / its area.
        With sigma = 0 there is no function behind the pixels, and the noise has variance 1 at every size.
        """
        draws = _at_least_float32(draws)
        if self.is_identity:
            return draws
        area = math.prod(draws.shape[-2:]) / math.prod(self.train_size)
        return draws * math.sqrt(area)

    def noise_like(self, x, generator=None):
        """T xi of the shape, device and precision of x; generator: one torch.Generator or a list of one per sample.

        A generator stands for one function, of which this is the values at the pixels of x [B, C, H,
        W], for any H and W. Coefficients below the Nyquist frequency of the training resolution are shared by all
        sizes that have them, and so are those above it: they hold erfc(pi sigma) of the variance along each axis, 9e-6
        for sigma = 1 and 3 % for sigma = 0.5, but without them it would be too small at the larger sizes.
        With sigma = 0 there is no function behind the pixels: independent draws, other ones at each size.
        """
        if self.is_identity:
            return _at_least_float32(randn(x.shape, generator, x.device).to(x.dtype))
        return self.noise_at(x, x.shape[-2:], (slice(None), slice(None)), generator)

    def noise_at(self, x, size, window, generator=None):
        """noise_like of an image of `size` (H, W), at the pixels in `window`, a slice of its rows and one of columns.

        x   [B, C, ...]: says how many, and of which device and precision
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        widths = [self.sigma / length for length in self.train_size]
        counts = [significant(length, width) for length, width in zip(size, widths, strict=True)]
        drawn = coefficients(x.shape[:2], counts, self.train_size, generator, x.device).to(dtype)
        rows, columns = (_cosines(*axis, x.device, dtype)[part]
                         for *axis, part in zip(size, counts, widths, self.train_size, window, strict=True))
        with torch.autocast(x.device.type, enabled=False):
            return rows @ drawn @ columns.T

    @functools.cached_property
    def noise_variance(self):
        """Pointwise variance of T xi (float), the mean over the pixels of an image; 1 / (4 pi sigma²) for sigma >= 1.

        It is trace(A_h²) / H · trace(A_w²) / W at the training resolution and the same at any other.
        """
        if self.is_identity:
            return 1.0
        image = torch.empty(self.train_size, dtype=torch.float64)
        return math.prod(kept.square().mean().item() for kept in self._per_axis(_attenuation, image))

    def _per_axis(self, make, x):
        """`make` for the rows and the columns of x; sigma as a fraction of an axis is the same at every resolution."""
        for length, train_length in zip(x.shape[-2:], self.train_size, strict=True):
            yield make(length, self.sigma / train_length, x.device, x.dtype)


def _at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.lru_cache(maxsize=32)
def dct_matrix(length, device, dtype):
    """Orthonormal DCT-II [length, length]: row k is the k-th cosine."""
    k = torch.arange(length, dtype=torch.float64)
    matrix = torch.cos(math.pi * k[:, None] * (k + 0.5) / length) * math.sqrt(2 / length)
    matrix[0] = math.sqrt(1 / length)
    return matrix.to(device, dtype)


@functools.lru_cache(maxsize=32)
def _attenuation(length, width, device, dtype):
    """Factor of T for every coefficient k of an axis, [length]; width is sigma as a fraction of the axis."""
    k = torch.arange(length, dtype=torch.float64)
    return torch.exp(-0.5 * (math.pi * width * k) ** 2).to(device, dtype)


@functools.lru_cache(maxsize=32)
def _cosines(length, count, width, train_length, device, dtype):
    """T of the first `count` basis functions at the pixel centres of an axis, [length, count].

    White noise averaged over a pixel of the training resolution has variance 1; that makes its unit train_length^-½.
    """
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return mollified_cosines(position, count, width, train_length**-0.5).to(device, dtype)


@functools.lru_cache(maxsize=32)
def _blur_matrix(length, width, device, dtype):
    """T along an axis, [length, length], symmetric."""
    cpu, double = torch.device("cpu"), torch.float64
    dct = dct_matrix(length, cpu, double)
    return (dct.T @ (_attenuation(length, width, cpu, double)[:, None] * dct)).to(device, dtype)
