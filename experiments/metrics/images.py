"""Scores of single images: closeness to an original, spectrum, denoising error, and distance to the training images."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dctn, idctn
from skimage.metrics import structural_similarity
from torch.utils.data import Subset

from data.coordinates import Coordinates
from data.loader import all_batches
from diffusion.sampling import UNGUIDED, encode, guided
from utils import rng

HIGHEST = 100.0  # dB; PSNR of equal images, so that every figure is finite


def psnr(image, truth, where=None):
    """Peak signal-to-noise ratio in dB, at most HIGHEST, of images [C, H, W] with values in 0 ... 255.

    where   bool [1, H, W]: restricts it to these pixels
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
    """(texture, seam): sums of absolute differences between neighbouring pixels of uint8 [C, H, W].

    inside    bool [1, H, W], a region; texture counts pairs within it, seam pairs across its border
    """
    texture = seam = 0.0
    for dim in (1, 2):
        difference = image.double().diff(dim=dim).abs()
        length = image.shape[dim]
        first, second = inside.narrow(dim, 0, length - 1), inside.narrow(dim, 1, length - 1)
        texture += (difference * (first & second)).sum().item()
        seam += (difference * (first ^ second)).sum().item()
    return texture, seam


def reconstruction_scores(originals, reconstructions, mollifier):
    """Closeness of reconstructions to originals, float [N, C, H, W] in [-1, 1], both blurred at the originals' size.

    Returns the dict {"count": N, "mollified_psnr": mean PSNR in dB, "nearest_is_own": number of reconstructions whose
    nearest of the N originals is their own}. Reconstructions of another size are resized first.
    """
    if reconstructions.shape != originals.shape:
        reconstructions = F.interpolate(reconstructions, originals.shape[-2:], mode="bilinear", antialias=True)
    a, b = mollifier.blur(originals).flatten(1), mollifier.blur(reconstructions).flatten(1)
    errors = torch.cdist(b, a).square() / a.shape[1]  # [reconstruction, original]
    own = errors.diagonal()
    return {"count": len(a), "mollified_psnr": (10 * torch.log10(4 / own)).mean().item(),
            "nearest_is_own": int((errors.argmin(1) == torch.arange(len(a))).sum())}


def radial_spectrum(images):
    """Power of images float [N, C, H, W] per wavenumber, float64 [min(H, W)] (docs/method.md, 7.5).

    Entry k is the mean square of the coefficients with |(k1, k2)| rounding to k, over images and channels. They belong
    to the orthonormal basis psi_k1(y) psi_k2(x), psi_0 = 1 and psi_k(u) = sqrt(2) cos(pi k u), the DCT-II divided by
    sqrt(HW), so the spectrum is that of a function over [0, 1]² and does not depend on the number of pixels. Wavenumber
    k is k / 2 waves per side; the boundary is reflective, so images need not be periodic.
    """
    height, width = images.shape[-2:]
    coefficients = dctn(images.double().numpy(), norm="ortho", axes=(-2, -1)) / np.sqrt(height * width)
    power = np.square(coefficients).mean(axis=(0, 1))
    wavenumber = np.rint(np.hypot(*np.ogrid[:height, :width])).astype(int).ravel()
    total, count = np.bincount(wavenumber, power.ravel()), np.bincount(wavenumber)
    return (total / count)[:min(height, width)]


def exact_flow(noise, spectrum, train_size):
    """The mollified Gaussian fields that the flow maps mollified noise [..., H, W] to, like it (docs/method.md, 8.1).

    spectrum    variances [M, M] of the coefficients of a field in the basis of radial_spectrum, zero beyond M
    train_size  (R_h, R_w); in this basis the coefficients of white noise have variance 1 / (R_h R_w)
    All coefficients are independent and normal, so the flow keeps the ratio of each to its standard deviation. T scales
    those of fields and noise alike.
    """
    height, width = noise.shape[-2:]
    gain = np.zeros((height, width))
    kept = spectrum[:height, :width]
    gain[:kept.shape[0], :kept.shape[1]] = np.sqrt(kept.numpy() * math.prod(train_size))
    coefficients = gain * dctn(noise.double().numpy(), norm="ortho", axes=(-2, -1))
    return torch.from_numpy(idctn(coefficients, norm="ortho", axes=(-2, -1))).to(noise.dtype)


def log_ratio(power, wanted, band):
    """(mean of |log10(power / wanted)|, mean of log10(power / wanted)) over the wavenumbers 1 to `band`."""
    ratio = np.log10(power[1:band + 1] / wanted[1:band + 1])
    return float(np.abs(ratio).mean()), float(ratio.mean())


def log_slope(power, last):
    """Least-squares slope of log power over log wavenumber, from 1 to `last`."""
    return float(np.polyfit(np.log(np.arange(1, last + 1)), np.log(power[1:last + 1]), 1)[0])


@torch.no_grad()
def denoising_errors(modules, diffusion, dataset, yardstick, batch_size=64, device="cpu"):
    """Mean squared error of the estimate of x_0, blurred by `yardstick`, in each quarter of the chain (docs/method.md,
    7.4): float [4], least noise first.

    Unlike training losses, it is comparable between mollifiers and parameterisations, whose targets have different
    units. Image i of N is noised on all pixels at step i · num_steps // N; its noise xi is always the same. The
    estimate of T x_0 is clipped and sharpened as at the end of sampling.
    modules     {"encoder", "decoder"} in eval mode
    yardstick   GaussianMollifier, the same for all models that are compared
    """
    errors = []
    for images, index, condition in all_batches(dataset, batch_size, device):
        coords = Coordinates.full(len(images), images.shape[-2:], device)
        z = encode(modules["encoder"], images)
        t = index.to(device) * diffusion.num_steps // len(dataset)
        noise = rng.randn(images.shape, rng.sample_generators(device, index, "denoising error"), device)
        network = guided(modules["decoder"], condition, UNGUIDED)
        denoise = diffusion.denoiser(lambda x, time, z=z, coords=coords, f=network: f(x, time, z, coords), coords)
        estimate = diffusion.mollifier.sharpen(denoise(diffusion.q_sample(images, t, noise), t)).clamp(-1, 1)
        errors.append(yardstick.blur(estimate - images).square().flatten(1).mean(1))
    return torch.stack([quarter.mean() for quarter in torch.cat(errors).tensor_split(4)])


class Nearest(NamedTuple):
    """The k nearest images of a data set for each of N images, nearest first.

    distance     mean squared difference after the mollifier, float32 [N, k]
    item         index in the data set, int64 [N, k]
    orientation  index in dataset.orientations of the near form of the item, int64 [N, k]
    """

    distance: torch.Tensor
    item: torch.Tensor
    orientation: torch.Tensor


def nearest_images(images, dataset, mollifier, k=3, limit=None, batch_size=256, num_workers=0, device="cpu"):
    """Nearest images of a data set, in all their orientations, to images float [N, C, H, W] in [-1, 1]: copies show up.

    All orientations of an item count as one. Images of another size than the data set's are resized first.
    limit    compare with this many items only, evenly spread over the data set; None: all
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    items = torch.arange(count) * len(dataset) // count
    size = dataset.size
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    images = mollifier.blur(images.to(device))
    n, orientations = len(images), dataset.orientations
    # |x − g(y)| = |g⁻¹(x) − y| for an orientation g, with which T commutes
    images = torch.cat([torch.rot90(images.flip(-1) if mirrored else images, -turns, (-2, -1))
                        for turns, mirrored in orientations]).flatten(1)
    best = Nearest(torch.empty(n, 0), *torch.empty(2, n, 0, dtype=torch.int64))
    for batch, index, _ in all_batches(Subset(dataset, items.tolist()), batch_size, device, num_workers):
        distance = torch.cdist(images, mollifier.blur(batch).flatten(1)).square() / images.shape[1]
        distance, orientation = distance.unflatten(0, (len(orientations), n)).min(dim=0)
        new = Nearest(distance.cpu(), items[index].expand(n, -1), orientation.cpu())
        both = [torch.cat(pair, dim=1) for pair in zip(best, new, strict=True)]
        order = both[0].argsort(dim=1, stable=True)[:, :k]
        best = Nearest(*(part.gather(1, order) for part in both))
    return best
