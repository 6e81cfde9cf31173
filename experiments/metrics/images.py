"""How close one 8-bit image is to another: PSNR, SSIM, and how much a filled-in region looks like what was there.

The power spectrum of images as functions over [0, 1]², which does not depend on how many pixels they have.

How well a network denoises, in a figure that compares models of different mollifiers and parameterisations.

Training losses do not: a network that predicts xi, v or T xi is measured in other units at every step, and T xi has a
variance that depends on sigma. What all of them have is an estimate of the image.

Are samples copies of training images? The nearest training images of each, in the distance after the mollifier.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from skimage.metrics import structural_similarity
from torch.utils.data import Subset

from data.coordinates import Coordinates
from data.loader import all_batches
from diffusion.sampling import encode
from utils import rng

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


STEPS_SHARE = 0.75  # of the chain: beyond it x_t tells next to nothing of x_0, and the estimate of a network that
# predicts noise is its error over sqrt(alpha_bar), which goes to zero; sampling corrects that later


@torch.no_grad()
def denoising_error(modules, diffusion, dataset, yardstick, batch_size=64, device="cpu"):
    """Mean squared error of the estimate of x_0, as `yardstick` (a GaussianMollifier) sees it.

    Of image i of N, on all pixels, at step i · T' // N of the first STEPS_SHARE of the chain, T': every step weighs the
    same. The estimate of T x_0 is clipped and sharpened as the end of sampling is, then image and estimate are blurred
    by the yardstick, which is one for all models. The noise of an image is always the same, xi before T.
    modules    {"encoder", "decoder"} in eval mode
    """
    errors, last = [], int(STEPS_SHARE * diffusion.num_steps)
    for images, index in all_batches(dataset, batch_size, device):
        coords = Coordinates.full(len(images), images.shape[-2:], device)
        z = encode(modules["encoder"], images)
        t = index.to(device) * last // len(dataset)
        noise = rng.randn(images.shape, rng.sample_generators(device, index, "denoising error"), device)
        denoise = diffusion.denoiser(lambda x, time, z=z, coords=coords: modules["decoder"](x, time, z, coords), coords)
        estimate = diffusion.mollifier.sharpen(denoise(diffusion.q_sample(images, t, noise), t)).clamp(-1, 1)
        errors.append(yardstick.blur(estimate - images).square().flatten(1).mean(1))
    return torch.cat(errors).mean().item()


class Nearest(NamedTuple):
    """The k nearest images of a data set for each of N images, nearest first.

    distance   mean squared difference after the mollifier, float32 [N, k]
    item       index in the data set, int64 [N, k]
    mirrored   whether the mirror image of the item is what is near, bool [N, k]
    """

    distance: torch.Tensor
    item: torch.Tensor
    mirrored: torch.Tensor


def nearest_images(images, dataset, mollifier, k=3, limit=None, batch_size=256, num_workers=0, device="cpu"):
    """Nearest of images float [N, C, H, W] in [−1, 1] among those of a data set and their mirror images.

    Training shows both, and both count as one: an item is at most once among the k. Images of another size than the
    data set's are resized to it first.
    limit    compare with so many items only, evenly spread over the data set; None: with all
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    items = torch.arange(count) * len(dataset) // count
    size = dataset.size
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    images = mollifier.blur(images.to(device))
    images = torch.cat([images, images.flip(-1)]).flatten(1)  # |x − mirror(y)| = |mirror(x) − y|, and T has no side
    n = len(images) // 2
    best = Nearest(torch.empty(n, 0), torch.empty(n, 0, dtype=torch.int64), torch.empty(n, 0, dtype=torch.bool))
    for batch, index in all_batches(Subset(dataset, items.tolist()), batch_size, device, num_workers):
        distance = torch.cdist(images, mollifier.blur(batch).flatten(1)).square() / images.shape[1]
        distance, side = distance.unflatten(0, (2, n)).min(dim=0)
        new = Nearest(distance.cpu(), items[index].expand(n, -1), side.bool().cpu())
        both = [torch.cat(pair, dim=1) for pair in zip(best, new, strict=True)]
        order = both[0].argsort(dim=1, stable=True)[:, :k]
        best = Nearest(*(part.gather(1, order) for part in both))
    return best
