"""The mollifier by its definition, in numpy and scipy: multiply DCT-II coefficients, or hold T as one big matrix."""

import numpy as np
from scipy.fft import dctn, idctn


def attenuation(size, sigmas):
    """exp(-(pi² / 2)(sigma_h² k1² / H² + sigma_w² k2² / W²)), [H, W]; sigmas in pixels of this image."""
    k1, k2 = np.arange(size[0])[:, None], np.arange(size[1])
    return np.exp(-np.pi**2 / 2 * ((sigmas[0] * k1 / size[0]) ** 2 + (sigmas[1] * k2 / size[1]) ** 2))


def filtered(image, gain):
    """Image [..., H, W] with every DCT-II coefficient multiplied by gain [H, W]."""
    return idctn(gain * dctn(image, axes=(-2, -1), norm="ortho"), axes=(-2, -1), norm="ortho")


def matrix(size, sigmas):
    """T as a matrix [HW, HW] over pixels in raster order: its columns are the blurred unit images."""
    pixels = size[0] * size[1]
    units = np.eye(pixels).reshape(pixels, *size)
    return filtered(units, attenuation(size, sigmas)).reshape(pixels, pixels).T
