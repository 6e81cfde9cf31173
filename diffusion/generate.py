"""From images to latents and back: the encoder, the decoder's sampling loop and the latent model's, as functions.

Models are taken as they are: put them in eval mode first (models.load and utils.ema.EMA do).
"""

import torch
import torch.nn.functional as F

from data.coordinates import Coordinates
from diffusion.samplers import sample
from utils import rng


@torch.no_grad()
def encode(encoder, images, known=None):
    """Latents [B, Z] of images [B, C, H, W], the mean where the encoding is stochastic.

    known   bool [B, 1, H, W], the pixels the encoder may see, in each image as many as there are; None: all
    """
    if known is None:
        return _encode_at(encoder, images, Coordinates.full(len(images), images.shape[-2:], images.device))
    return torch.cat([_encode_at(encoder, image[None], Coordinates(mask.flatten().nonzero().T, images.shape[-2:]))
                      for image, mask in zip(images, known, strict=True)])


@torch.no_grad()
def decode(
    decoder, diffusion, z, size, sampler="ddim", generators=None, channels=3, eta=0.0, progress=None, path=None
):
    """Images float32 [B, C, H, W] in [−1, 1] for latents z [B, Z], at any size (H, W).

    The chain starts at Tξ and stays in T-space; its last state T x_0 is sharpened once, by the Wiener filter.
    generators   one torch.Generator per image; the image is a function of it and of z
    progress     called with 1 after every step
    path         (denoise, Tξ) -> the path of states, in place of that of `sampler`: guidance, or another start
    """
    coords = Coordinates.full(len(z), size, z.device)
    denoise = diffusion.denoiser(lambda values, t: decoder(values, t, z, coords), coords)
    start = torch.empty(len(z), channels, *size, device=z.device)
    x = diffusion.mollifier.noise_like(start, generators)
    states = sample(sampler, denoise, x, diffusion, generators, eta) if path is None else path(denoise, x)
    for _, state in states:
        if progress:
            progress(1)
    return diffusion.mollifier.sharpen(state).clamp(-1, 1)


@torch.no_grad()
def sample_latents(latent_model, diffusion, mean, std, generators, sampler="ddim", progress=None):
    """Latents float32 [B, Z] in the encoder's units, one per generator; mean, std [Z] undo the standardisation."""
    denoise = diffusion.denoiser(latent_model, None, clip=False)
    x = rng.randn((len(generators), len(mean)), generators, mean.device)
    for _, state in sample(sampler, denoise, x, diffusion, generators):
        if progress:
            progress(1)
    return state * std + mean


def _encode_at(encoder, images, coords):
    z = encoder(coords.gather(images), coords)
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
