"""The spectrum of functions whose coefficients are known."""

import math

import numpy as np
import pytest
import torch

from experiments.metrics.images import log_ratio, radial_spectrum


def mode(k1, k2, height, width):
    """ψ_k1(y) ψ_k2(x) at the pixel centres, [1, 1, H, W]."""
    def axis(k, length):
        u = (torch.arange(length, dtype=torch.float64) + 0.5) / length
        return torch.cos(math.pi * k * u) * math.sqrt(2 if k else 1)
    return torch.outer(axis(k1, height), axis(k2, width))[None, None]


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (24, 17)])
@pytest.mark.parametrize("k1, k2, wavenumber, modes", [(0, 0, 0, 1), (0, 1, 1, 3), (3, 4, 5, 8), (5, 0, 5, 8)])
def test_a_single_mode_is_in_one_bin_with_the_same_power_at_any_size(size, k1, k2, wavenumber, modes):
    """By hand: as many (k1, k2) with k1, k2 >= 0 round to the wavenumber; 3 of length 1 are (0, 1), (1, 0), (1, 1)."""
    power = radial_spectrum(0.3 * mode(k1, k2, *size))
    assert len(power) == min(size)
    expected = np.zeros(min(size))
    expected[wavenumber] = 0.09 / modes
    np.testing.assert_allclose(power, expected, atol=1e-15)


def test_the_mean_is_over_images_and_channels():
    images = torch.cat([mode(0, 2, 8, 8), mode(0, 3, 8, 8)], dim=1)
    np.testing.assert_allclose(radial_spectrum(images), radial_spectrum(images.flip(1)))
    np.testing.assert_allclose(radial_spectrum(torch.cat([images, 0 * images])), radial_spectrum(images) / 2)
    np.testing.assert_allclose(radial_spectrum(images)[2], radial_spectrum(images[:, :1])[2] / 2)


def test_log_ratio_over_a_band():
    wanted = np.array([1.0, 2, 4, 8, 16])
    assert log_ratio(10 * wanted, wanted, 4) == pytest.approx((1, 1))
    power = wanted * [1e9, 10, 0.1, 1, 1e9]
    assert log_ratio(power, wanted, 3) == pytest.approx((2 / 3, 0))
