"""From images to latents and back: the encoder, the decoder's sampling loop and the latent model's, as functions.

Models are taken as they are: put them in eval mode first (models.load and utils.optimiser.EMA do).
"""

import math

import torch
import torch.nn.functional as F

from data.coordinates import Coordinates
from diffusion.samplers import ddim_invert, sample
from utils import rng


@torch.no_grad()
def encode(encoder, images, known=None, max_points=None):
    """Latents [B, Z] of images [B, C, H, W], the mean where the encoding is stochastic.

    known        bool [B, 1, H, W], the pixels the encoder may see, in each image as many as there are; None: all
    max_points   pixels of all images together that the network takes at a time, where it sees all; None: no limit
    """
    if known is None:
        return torch.cat([
            _encode_at(encoder, part, Coordinates.full(len(part), part.shape[-2:], part.device), max_points)
            for part in images.split(images_at_once(len(images), images.shape[-2:], max_points))])
    return torch.cat([_encode_at(encoder, image[None], Coordinates(mask.flatten().nonzero().T, images.shape[-2:]))
                      for image, mask in zip(images, known, strict=True)])


@torch.no_grad()
def decode(
    decoder, diffusion, z, size, sampler="ddim", generators=None, channels=3, eta=0.0, progress=None, path=None,
    max_points=None
):
    """Images float32 [B, C, H, W] in [−1, 1] for latents z [B, Z], at any size (H, W).

    The chain starts at Tξ and stays in T-space; its last state T x_0 is sharpened once, by the Wiener filter.
    generators   one torch.Generator per image; the image is a function of it and of z, at every size the same one
    progress     called after every step with the share of the images that it was for
    path         (denoise, Tξ) -> the path of states, in place of that of `sampler`: guidance, or another start
    max_points   pixels of all images together that the network takes at a time; None: no limit
    """
    images, at_once = [], len(z) if path else images_at_once(len(z), size, max_points)
    for first in range(0, len(z), at_once):
        latents = z[first : first + at_once]
        streams = generators and generators[first : first + at_once]
        coords = Coordinates.full(len(latents), size, z.device)
        denoise = diffusion.denoiser(as_model_fn(decoder, latents, coords, max_points), coords)
        start = torch.empty(len(latents), channels, *size, device=z.device)
        x = diffusion.mollifier.noise_like(start, streams)
        for _, state in path(denoise, x) if path else sample(sampler, denoise, x, diffusion, streams, eta):
            if progress:
                progress(len(latents) / len(z))
        images.append(diffusion.mollifier.sharpen(state).clamp(-1, 1))
    return torch.cat(images)


@torch.no_grad()
def invert(decoder, diffusion, images, z, progress=None, max_points=None):
    """The state of the last step, [B, C, H, W], that ddim leads back to images [B, C, H, W] with latents z [B, Z].

    progress and max_points as in decode; the chain's first state, T x_0, is there without a step.
    """
    coords = Coordinates.full(len(z), images.shape[-2:], z.device)
    denoise = diffusion.denoiser(as_model_fn(decoder, z, coords, max_points), coords)
    for _, state in ddim_invert(denoise, diffusion.mollifier.blur(images), diffusion.schedule):
        if progress:
            progress(1)
    return state


@torch.no_grad()
def sample_latents(latent_model, diffusion, mean, std, generators, sampler="ddim", progress=None):
    """Latents float32 [B, Z] in the encoder's units, one per generator; mean, std [Z] undo the standardisation."""
    denoise = diffusion.denoiser(latent_model, None, clip=False)
    x = rng.randn((len(generators), len(mean)), generators, mean.device)
    for _, state in sample(sampler, denoise, x, diffusion, generators):
        if progress:
            progress(1)
    return state * std + mean


def images_at_once(count, size, max_points):
    """How many of `count` images of a size (H, W) to work on at a time: so many have no more than max_points pixels in
    all, or it is one, which may then be computed in parts. None: no limit."""
    return count if max_points is None else min(count, max(max_points // math.prod(size), 1))


def as_model_fn(decoder, z, coords, max_points=None):
    """The decoder as the function (values [B, L, C], t) -> [B, L, C] that a GaussianDiffusion takes."""
    return lambda values, t: decoder(values, t, z, coords, max_points=max_points)


def _encode_at(encoder, images, coords, max_points=None):
    z = encoder(coords.gather(images), coords, max_points=max_points)
    return (z[1] if isinstance(z, tuple) else z).float()


def reconstruction_scores(originals, reconstructions, mollifier):
    """How close reconstructions are to originals, both float [N, C, H, W], after blurring both at the size of the
    originals: PSNR in dB, and for how many the nearest of the N originals is the reconstruction's own."""
    if reconstructions.shape != originals.shape:
        reconstructions = F.interpolate(
            reconstructions, originals.shape[-2:], mode="bilinear", antialias=True)
    a, b = mollifier.blur(originals).flatten(1), mollifier.blur(reconstructions).flatten(1)
    errors = torch.cdist(b, a).square() / a.shape[1]  # reconstructions in rows, originals in columns
    own = errors.diagonal()
    return {"count": len(a), "mollified_psnr": (10 * torch.log10(4 / own)).mean().item(),
            "nearest_is_own": int((errors.argmin(1) == torch.arange(len(a))).sum())}
