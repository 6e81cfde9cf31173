"""The mollifier T, a Gaussian blur that turns white noise into a function over [0, 1]² (docs/method.md, 2).

T multiplies coefficient (k1, k2) of the orthonormal DCT-II of an H×W image, whose boundary is reflective, by

    G(k1, k2) = exp(-(pi² sigma² / 2)(k1² / H² + k2² / W²)),    sigma in pixels of that image.

Both the transform and the factor separate into rows and columns, so T x = A_h x A_w with one symmetric matrix per axis.

Noise is one function for all resolutions (2.4). In the orthonormal basis psi_k1(y) psi_k2(x), psi_0 = 1 and
psi_k(u) = sqrt(2) cos(pi k u), the coefficients of white noise are independent standard normal draws. An image of H×W
is the sum over k1 < H and k2 < W, which is a DCT-II; every size uses the same coefficients.
"""

import functools
import math

import torch

from utils import rng

WIENER_EPS = 0.05  # epsilon of the Wiener filter, as released
NEGLIGIBLE = 1e-8  # coefficients that T attenuates further do not show in float32


class GaussianMollifier:
    """T and its regularised inverse: one operator on functions over [0, 1]² for images of any size.

    sigma       standard deviation in pixels at the training resolution; 0 makes T the identity
    train_size  training resolution, R or (H, W); not needed if sigma is 0
    wiener_eps  epsilon of the Wiener filter, an inverse signal-to-noise ratio

    Methods take and return tensors [..., H, W] and compute in float32 (float64 stays float64), also under autocast.
    With sigma = 0 they accept any shape, so that latents [B, Z] use the same diffusion code.
    """

    def __init__(self, sigma, train_size=None, wiener_eps=WIENER_EPS):
        if sigma > 0 and train_size is None:
            raise ValueError("a mollifier with sigma > 0 needs the training resolution")
        self.sigma = float(sigma)
        self.train_size = (train_size, train_size) if isinstance(train_size, int) else train_size
        self.wiener_eps = wiener_eps

    @property
    def is_identity(self):
        return self.sigma == 0

    def blur(self, x):
        """T x (docs/method.md, 2.1)."""
        x = _at_least_float32(x)
        if self.is_identity:
            return x
        rows, columns = self._per_axis(_blur_matrix, x)
        with torch.autocast(x.device.type, enabled=False):
            return rows @ x @ columns

    def sharpen(self, x):
        """The Wiener filter, G / (G² + eps²) per DCT coefficient (docs/method.md, 2.2)."""
        x = _at_least_float32(x)
        if self.is_identity:
            return x
        rows, columns = (dct_matrix(length, x.device, x.dtype) for length in x.shape[-2:])
        attenuation = torch.outer(*self._per_axis(_attenuation, x))
        gain = attenuation / (attenuation**2 + self.wiener_eps**2)
        with torch.autocast(x.device.type, enabled=False):
            return rows.T @ (gain * (rows @ x @ columns.T)) @ columns

    def scale_noise(self, draws):
        """White noise xi from standard normal draws [..., H, W]: sqrt(s_h s_w) draws (docs/method.md, 2.3).

        s_h and s_w are the size relative to the training resolution: the average of white noise over a pixel has
        variance 1 / area. With sigma = 0 there is no underlying function, and the variance is 1 at every size.
        """
        draws = _at_least_float32(draws)
        if self.is_identity:
            return draws
        area = math.prod(draws.shape[-2:]) / math.prod(self.train_size)
        return draws * math.sqrt(area)

    def noise_like(self, x, generator=None):
        """T xi, like x [B, C, H, W] in shape, device and precision (docs/method.md, 2.4).

        A generator (one torch.Generator, or a list of one per sample) determines a function; the result is its values
        at the pixels for any H and W. Coefficients above the Nyquist frequency of the training resolution are shared
        by all sizes too. They hold erfc(pi sigma) of the variance along each axis, 9e-6 for sigma = 1 and 3 % for
        sigma = 0.5; without them noise would be too weak at larger sizes.
        With sigma = 0 the pixels are independent draws, different ones at each size.
        """
        if self.is_identity:
            return _at_least_float32(rng.randn(x.shape, generator, x.device).to(x.dtype))
        return self.noise_at(x, x.shape[-2:], (slice(None), slice(None)), generator)

    def noise_at(self, x, size, window, generator=None):
        """noise_like of an image of `size` (H, W), at the pixels in `window`, a slice of rows and one of columns.

        x   [B, C, ...], determines batch, channels, device and precision
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        widths = [self.sigma / length for length in self.train_size]
        counts = [_significant(length, width) for length, width in zip(size, widths, strict=True)]
        drawn = coefficients(x.shape[:2], counts, self.train_size, generator, x.device).to(dtype)
        rows, columns = (_cosines(*axis, x.device, dtype)[part]
                         for *axis, part in zip(size, counts, widths, self.train_size, window, strict=True))
        with torch.autocast(x.device.type, enabled=False):
            return rows @ drawn @ columns.T

    @functools.cached_property
    def noise_variance(self):
        """Pointwise variance of T xi (float), averaged over the pixels: trace(A_h²) / H · trace(A_w²) / W.

        It is the same at every resolution, 1 / (4 pi sigma²) inside an image for sigma >= 1.
        """
        if self.is_identity:
            return 1.0
        image = torch.empty(self.train_size, dtype=torch.float64)
        return math.prod(kept.square().mean().item() for kept in self._per_axis(_attenuation, image))

    def _per_axis(self, make, x):
        """`make` for rows and columns of x; sigma is the same fraction of an axis at every resolution."""
        for length, train_length in zip(x.shape[-2:], self.train_size, strict=True):
            yield make(length, self.sigma / train_length, x.device, x.dtype)


def coefficients(lead, count, block, generator=None, device=None):
    """The first count = (rows, columns) coefficients of white noise, float32 [*lead, rows, columns].

    Each is a function of its place and the sample's generator alone; a larger count adds coefficients and changes none.
    The first block = (R_h, R_w), the training resolution, is drawn from the generator itself. Further blocks are drawn
    from a second stream that the generator seeds. The generator thus advances equally for any count, and the noise that
    a sampler adds in later steps is also shared by all sizes.
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
    """Places (i, j) with i, j < count, sorted by max(i, j), so that a larger count appends places."""
    return sorted(((i, j) for i in range(count) for j in range(count)), key=lambda place: (max(place), place))


def _significant(length, width):
    """Number of coefficients of an axis of `length` pixels to keep; width is sigma as a fraction of the axis."""
    return math.ceil(min(length, math.sqrt(-2 * math.log(NEGLIGIBLE)) / (math.pi * width)))


def mollified_cosines(position, count, width, scale):
    """scale · exp(-(pi width k)² / 2) psi_k(u) for positions u float64 [n] and k < count, [n, count]."""
    k = torch.arange(count, dtype=torch.float64)
    basis = torch.cos(math.pi * position[:, None] * k) * math.sqrt(2)
    basis[:, 0] = 1
    return basis * torch.exp(-0.5 * (math.pi * width * k) ** 2) * scale


def _at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.lru_cache(maxsize=32)
def dct_matrix(length, device, dtype):
    """Orthonormal DCT-II [length, length]; row k is the k-th cosine."""
    k = torch.arange(length, dtype=torch.float64)
    matrix = torch.cos(math.pi * k[:, None] * (k + 0.5) / length) * math.sqrt(2 / length)
    matrix[0] = math.sqrt(1 / length)
    return matrix.to(device, dtype)


@functools.lru_cache(maxsize=32)
def _attenuation(length, width, device, dtype):
    """G along an axis, [length]; width is sigma as a fraction of the axis."""
    k = torch.arange(length, dtype=torch.float64)
    return torch.exp(-0.5 * (math.pi * width * k) ** 2).to(device, dtype)


@functools.lru_cache(maxsize=32)
def _cosines(length, count, width, train_length, device, dtype):
    """T of the first `count` basis functions at the pixel centres of an axis, [length, count].

    The factor train_length^-½ gives white noise, averaged over a pixel of the training resolution, the variance 1.
    """
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return mollified_cosines(position, count, width, train_length**-0.5).to(device, dtype)


@functools.lru_cache(maxsize=32)
def _blur_matrix(length, width, device, dtype):
    """T along an axis, [length, length], symmetric."""
    cpu, double = torch.device("cpu"), torch.float64
    dct = dct_matrix(length, cpu, double)
    return (dct.T @ (_attenuation(length, width, cpu, double)[:, None] * dct)).to(device, dtype)
