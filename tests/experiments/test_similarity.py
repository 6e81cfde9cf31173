"""Closeness of images against closed forms."""

import math

import pytest
import torch

from experiments.metrics.images import HIGHEST, psnr, roughness, ssim


def noise(seed, *shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_psnr_of_a_constant_difference():
    truth = torch.full((3, 8, 9), 100, dtype=torch.uint8)
    assert psnr(truth + 10, truth) == psnr(truth - 10, truth) == pytest.approx(20 * math.log10(25.5))
    assert psnr(truth, truth) == HIGHEST
    part = torch.zeros(1, 8, 9, dtype=torch.bool)
    part[:, :2] = True
    changed = torch.where(part, truth + 10, truth)
    assert psnr(changed, truth, part) == psnr(truth + 10, truth)
    assert psnr(changed, truth, ~part) == HIGHEST
    assert psnr(changed, truth) == pytest.approx(psnr(truth + 10, truth) + 10 * math.log10(4))


def test_ssim_knows_equal_opposite_and_unrelated_images():
    for channels in (1, 3):
        image, other = noise(0, channels, 16, 19), noise(1, channels, 16, 19)
        assert ssim(image, image) == pytest.approx(1)
        assert ssim(255 - image, image) < -0.8
        assert abs(ssim(other, image)) < 0.2


def test_roughness_counts_steps_within_a_region_and_across_its_border():
    inside = torch.zeros(1, 6, 6, dtype=torch.bool)
    inside[:, 1:5, 1:5] = True
    flat = torch.full((1, 6, 6), 50, dtype=torch.uint8)
    assert roughness(flat, inside) == (0, 0)
    assert roughness(torch.where(inside, flat + 3, flat), inside) == (0, 3 * 16)  # four sides of four pixels
    stripes = torch.where(torch.arange(6) % 2 == 0, flat, flat + 2)
    assert roughness(stripes, inside) == (2 * 3 * 4, 2 * 8)
