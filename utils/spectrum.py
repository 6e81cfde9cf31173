"""The power spectrum of images as functions over [0, 1]², which does not depend on how many pixels they have."""

import numpy as np
from scipy.fft import dctn


def radial_spectrum(images):
    """Mean square of the coefficients of each wavenumber of images float [N, C, H, W], float64 [min(H, W)].

    The coefficients are those of the orthonormal basis ψ_k1(y) ψ_k2(x), ψ_0 = 1 and ψ_k(u) = √2 cos(πku): the DCT-II of
    the image over √(HW). Entry k is the mean over all |(k1, k2)| that round to k, which is k/2 waves per side, and over
    images and channels. The boundary is reflected: an image need not be periodic.
    """
    height, width = images.shape[-2:]
    coefficients = dctn(images.double().numpy(), norm="ortho", axes=(-2, -1)) / np.sqrt(height * width)
    power = np.square(coefficients).mean(axis=(0, 1))
    wavenumber = np.rint(np.hypot(*np.ogrid[:height, :width])).astype(int).ravel()
    total, count = np.bincount(wavenumber, power.ravel()), np.bincount(wavenumber)
    return (total / count)[:min(height, width)]


def log_ratio(power, wanted, band):
    """(mean of |log10(power / wanted)|, mean of log10(power / wanted)) over the wavenumbers 1 to `band`."""
    ratio = np.log10(power[1:band + 1] / wanted[1:band + 1])
    return float(np.abs(ratio).mean()), float(ratio.mean())
