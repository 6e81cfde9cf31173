"""Posterior sampling of linear inverse problems y = A x_0 + n (docs/inverse_problems.md).

A sampler draws from the posterior p(x_0 | y) if its denoiser is E[T x_0 | x_t, y] instead of E[T x_0 | x_t]. With m the
network's estimate of x_0, C_t the covariance of x_0 given x_t, and s the noise level of y,

    E[x_0 | x_t, y] = m + C_t A* (A C_t A* + s²)⁻¹ (y − A m)

if x_0 is normal given x_t. The states are x_t = T(a x_0 + b ξ), of diffusion or of a flow. If the DCT coefficients of
x_0 are independent, with the covariance S(k) between channels, C_t is diagonal in k. With ρ the variance of the white
noise ξ at this size,

    C_t(k) = b² ρ S(k) (a² S(k) + b² ρ)⁻¹

The rule is exact for a Gaussian random field with this covariance. S is measured on training data. ΠGDM (Song et al.
2023) corresponds to a white S.
"""

import torch

from diffusion.mollifier import dct_matrix
from diffusion.operators import conjugate_gradients


class Spectrum:
    """Covariance S(k) [C, C] of the DCT-II coefficients of images, as eigenvalues and eigenvectors.

    values    [C, H, W], at least 0, of the orthonormal DCT at the size (H, W)
    vectors   [C, C, H, W], the eigenvectors are vectors[:, i]
    """

    def __init__(self, values, vectors):
        self.values, self.vectors = values, vectors

    @classmethod
    def of_covariance(cls, covariance):
        """From S [C, C, H, W] itself."""
        values, vectors = torch.linalg.eigh(covariance.double().permute(2, 3, 0, 1))
        return cls(values.clamp(min=0).permute(2, 0, 1), vectors.permute(2, 3, 0, 1))

    @classmethod
    def of_images(cls, images):
        """Estimate from images [N, C, H, W], about their mean."""
        coefficients = dct((images - images.mean(0)).double())
        return cls.of_covariance(torch.einsum("nchw,ndhw->cdhw", coefficients, coefficients) / len(images))

    def at(self, size):
        """The spectrum of the same functions at another size, with variance 0 above the Nyquist frequency of this one.

        Orthonormal coefficients grow with the square root of the number of pixels.
        """
        (channels, height, width), (rows, columns) = self.values.shape, size
        shared = (..., slice(min(height, rows)), slice(min(width, columns)))
        values = self.values.new_zeros(channels, *size)
        vectors = torch.eye(channels).to(self.vectors)[:, :, None, None].repeat(1, 1, *size)
        values[shared] = self.values[shared] * (rows * columns / (height * width))
        vectors[shared] = self.vectors[shared]
        return Spectrum(values, vectors)

    def to(self, like):
        """The spectrum in the dtype and on the device of the tensor `like`."""
        return Spectrum(self.values.to(like), self.vectors.to(like))

    def apply(self, function, image):
        """The matrix `function`(S) times images [B, C, H, W]; `function` maps eigenvalues [C, H, W]."""
        principal = torch.einsum("cdhw,bchw->bdhw", self.vectors, dct(image))
        return idct(torch.einsum("cdhw,bdhw->bchw", self.vectors, function(self.values) * principal))

    def apply_covariance(self, image):
        """The covariance of the images, times images [B, C, H, W]."""
        return self.apply(lambda values: values, image)


class PosteriorDenoiser:
    """A Denoiser with the estimate E[T x_0 | x_t, y], for any sampler.

    denoise     Denoiser, E[T x_0 | x_t]
    diffusion   GaussianDiffusion or Flow, of which the schedule and the mollifier are used
    operator    A (diffusion.operators), with the noise level s
    data        y, in the shape of operator.A's result
    spectrum    Spectrum of x_0 at the size of the images
    tolerance   relative residual at which the linear system counts as solved, by conjugate gradients
    """

    def __init__(self, denoise, diffusion, operator, data, spectrum, tolerance=1e-4):
        self.denoise = denoise
        self.levels = {t: level for t, level, _ in diffusion.schedule.levels()}  # (a, b) of every step
        self.mollifier = diffusion.mollifier
        self.operator = operator
        self.data = data
        self.spectrum = spectrum
        self.tolerance = tolerance

    def __call__(self, x, t):
        return self._conditioned(self.denoise(x, t), t)

    def with_variance(self, x, t):
        """The estimate, and the variance of the Denoiser."""
        estimate, variance = self.denoise.with_variance(x, t)
        return self._conditioned(estimate, t), variance

    def jump(self, x, t):
        """The corrected estimate of a jump (docs/method.md, 8); no longer exact."""
        return self._conditioned(self.denoise.jump(x, t), t)

    def _conditioned(self, tx0, t):
        """T E[x_0 | x_t, y] from T E[x_0 | x_t] [B, C, H, W]; all images are at the same step."""
        with torch.autocast(tx0.device.type, enabled=False):
            return tx0 + self._correction(tx0, t)

    def _correction(self, tx0, t):
        spectrum = self.spectrum.to(tx0)
        a, b = map(float, self.levels[t[0].item()])
        signal, noise = a**2, b**2 * self.mollifier.scale_noise(torch.ones_like(tx0[0])) ** 2

        def remaining(variance):
            return variance * noise / (signal * variance + noise)

        residual = self.data - self.operator.A(self.mollifier.sharpen(tx0))
        return self.mollifier.blur(gaussian_update(
            self.operator, residual, lambda image: spectrum.apply(remaining, image), self.tolerance))


def gaussian_update(operator, residual, covariance, tolerance=1e-4):
    """C A* (A C A* + s²)⁻¹ residual, for a function `covariance` that applies C; residual like operator.A's result."""
    def data_covariance(v):
        return operator.A(covariance(operator.A_adjoint(v))) + operator.noise**2 * v

    return covariance(operator.A_adjoint(conjugate_gradients(data_covariance, residual, tolerance=tolerance)))


def dct(image):
    """Orthonormal DCT-II of images [..., H, W]."""
    rows, columns = (dct_matrix(length, image.device, image.dtype) for length in image.shape[-2:])
    return rows @ image @ columns.T


def idct(coefficients):
    """The inverse of dct."""
    rows, columns = (dct_matrix(length, coefficients.device, coefficients.dtype) for length in coefficients.shape[-2:])
    return rows.T @ coefficients @ columns
