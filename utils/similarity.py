"""How close one 8-bit image is to another: PSNR, SSIM, and how much a filled-in region looks like what was there."""

import torch
from skimage.metrics import structural_similarity

HIGHEST = 100.0  # dB, of equal images, so that every figure is finite


def psnr(image, truth, where=None):
    """Peak signal-to-noise ratio in dB, at most HIGHEST, of images [C, H, W] with values in 0 ... 255.

    where   bool [1, H, W]: of these pixels alone
    """
    errors = (image.double() - truth.double()).square()
    if where is not None:
        errors = errors[where.expand_as(errors)]
    return min(10 * torch.log10(255**2 / errors.mean()).item(), HIGHEST)


def ssim(image, truth):
    """Structural similarity (Wang et al. 2004: Gaussian window, sigma 1.5) of uint8 images [C, H, W], at least 11²."""
    return float(structural_similarity(image.numpy(), truth.numpy(), channel_axis=0, data_range=255,
                                       gaussian_weights=True, sigma=1.5, use_sample_covariance=False))


def roughness(image, inside):
    """Sums of absolute differences between neighbouring pixels of uint8 [C, H, W] (texture, seam).

    inside    bool [1, H, W], a region
    texture   of pairs within the region, seam of pairs across its border
    """
    texture = seam = 0.0
    for dim in (1, 2):
        difference = image.double().diff(dim=dim).abs()
        length = image.shape[dim]
        first, second = inside.narrow(dim, 0, length - 1), inside.narrow(dim, 1, length - 1)
        texture += (difference * (first & second)).sum().item()
        seam += (difference * (first ^ second)).sum().item()
    return texture, seam
