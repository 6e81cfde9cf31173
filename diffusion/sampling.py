"""Images to latents and back: the encoder and the sampling loops of the decoder and of the latent model, as functions.

Models are used in their present mode; switch them to eval mode first (models.load and utils.optimiser.EMA do).
"""

import math
from typing import NamedTuple

import torch

from data.conditions import none_like
from data.coordinates import Coordinates
from diffusion.samplers import invert as inverse_path
from diffusion.samplers import sample
from utils import rng


class Guidance(NamedTuple):
    """Classifier-free guidance (docs/conditions.md; Ho and Salimans 2022): f = f_none + scale · (f_condition − f_none).

    interval    fractions of the chain, from noise (0) to image (1), between which it acts; elsewhere f = f_condition
    """

    scale: float = 1.0
    interval: tuple = (0.0, 1.0)

    @property
    def evaluations(self):
        """Most evaluations of the network for one of a sampler."""
        return 1 if self.scale == 1 else 2

    def acts(self, t):
        """True at the time t [B] or [B, 2] of the network, the same for all samples."""
        if self.scale == 1 or self.interval == (0, 1):
            return self.scale != 1
        return self.interval[0] <= 1 - t.flatten()[0].item() / 1000 <= self.interval[1]


UNGUIDED = Guidance()


class _Guided:
    """A SparseUNet or MLPSkipNet, and called like one, that follows a condition.

    Guidance evaluates the network with and without the condition, as one batch of twice as many samples.
    """

    def __init__(self, network, condition, guidance):
        self.network, self.condition, self.guidance = network, condition, guidance

    def __call__(self, values, t, *where, **options):
        if not self.guidance.acts(t):
            return self.network(values, t, *where, **options, condition=self.condition)
        both = self._both(self.network, values, t, *where, **options)
        followed, free = both.chunk(2)
        channels = values.shape[-1]  # the prediction; learned variances are those with the condition
        result = torch.lerp(free[..., :channels], followed[..., :channels], self.guidance.scale)
        return torch.cat([result, followed[..., channels:]], dim=-1)

    def grid_features(self, values, t, *where, **options):
        """Those of both evaluations where there are two, for the option `grid` of a call."""
        if not self.guidance.acts(t):
            return self.network.grid_features(values, t, *where, **options, condition=self.condition)
        return self._both(self.network.grid_features, values, t, *where, **options)

    def _both(self, function, *inputs, **options):
        twice = [one.doubled() if isinstance(one, Coordinates) else torch.cat([one, one]) for one in inputs]
        return function(*twice, **options, condition=torch.cat([self.condition, none_like(self.condition)]))


def guided(network, condition, guidance):
    """The network with the condition of its batch; itself if there is none, or if it was trained without."""
    if condition is None or network.condition is None:
        return network
    return _Guided(network, condition, guidance)


@torch.no_grad()
def encode(encoder, images, known=None, max_points=None):
    """Latents float32 [B, Z] of images [B, C, H, W]; the mean if the encoder is stochastic (docs/method.md, 4.7).

    known        bool [B, 1, H, W], the pixels that the encoder sees, any number per image; None: all
    max_points   pixels of all images together that the network takes at a time if known is None; None: no limit
    """
    if known is None:
        return torch.cat([
            _encode_at(encoder, part, Coordinates.full(len(part), part.shape[-2:], part.device), max_points)
            for part in images.split(images_at_once(len(images), images.shape[-2:], max_points))])
    return torch.cat([_encode_at(encoder, image[None], Coordinates(mask.flatten().nonzero().T, images.shape[-2:]))
                      for image, mask in zip(images, known, strict=True)])


@torch.no_grad()
def decode(
    decoder, diffusion, z, size, generators=None, channels=3, eta=0.0, progress=None, path=None,
    max_points=None, condition=None, guidance=UNGUIDED
):
    """Images float32 [B, C, H, W] in [-1, 1] for latents z [B, Z], at any size (H, W) (docs/method.md, 5).

    The chain starts at T xi and stays in the mollified space. The Wiener filter sharpens its last state T x_0 once.
    generators   one torch.Generator per image; z and its generator determine an image, the same one at every size
    progress     called after every step with the fraction of the images that the step was for
    path         (denoise, T xi) -> path of states, in place of that of the diffusion's sampler: guidance, or another
                 initial state
    max_points   pixels of all images together that the network takes at a time; None: no limit
    condition    of the images (data.conditions); None: none
    guidance     Guidance
    """
    most = max_points and max_points // guidance.evaluations
    images, at_once = [], len(z) if path else images_at_once(len(z), size, most)
    for first in range(0, len(z), at_once):
        latents = z[first : first + at_once]
        streams = generators and generators[first : first + at_once]
        network = guided(decoder, condition if condition is None else condition[first : first + at_once], guidance)
        denoise = _denoiser(network, diffusion, latents, size, max_points)
        start = torch.empty(len(latents), channels, *size, device=z.device)
        x = diffusion.mollifier.noise_like(start, streams)
        for _, state in path(denoise, x) if path else sample(denoise, x, diffusion, streams, eta):
            if progress:
                progress(len(latents) / len(z))
        images.append(diffusion.mollifier.sharpen(state).clamp(-1, 1))
    return torch.cat(images)


@torch.no_grad()
def invert(decoder, diffusion, images, z, progress=None, max_points=None, condition=None, guidance=UNGUIDED):
    """The state of the last step, [B, C, H, W], that the sampler maps back to images [B, C, H, W] with latents
    z [B, Z].

    Other arguments as in decode; for progress, T x_0, the first state, counts as a step.
    """
    denoise = _denoiser(guided(decoder, condition, guidance), diffusion, z, images.shape[-2:], max_points)
    for _, state in inverse_path(denoise, diffusion.mollifier.blur(images), diffusion):
        if progress:
            progress(1)
    return state


@torch.no_grad()
def sample_latents(latent_model, diffusion, mean, std, generators, progress=None, condition=None, guidance=UNGUIDED):
    """Latents float32 [B, Z] in the encoder's units, one per generator; mean and std [Z] undo the standardisation.

    condition and guidance as in decode
    """
    denoise = diffusion.denoiser(guided(latent_model, condition, guidance), None, clip=False)
    x = rng.randn((len(generators), len(mean)), generators, mean.device)
    for _, state in sample(denoise, x, diffusion, generators):
        if progress:
            progress(1)
    return state * std + mean


def images_at_once(count, size, max_points):
    """How many of `count` images of size (H, W) to process together: at most max_points pixels, but at least one image,
    which the network then processes in parts. max_points None: no limit."""
    return count if max_points is None else min(count, max(max_points // math.prod(size), 1))


def _denoiser(decoder, diffusion, z, size, max_points):
    coords = Coordinates.full(len(z), size, z.device)
    return diffusion.denoiser(lambda values, t: decoder(values, t, z, coords, max_points=max_points), coords)


def _encode_at(encoder, images, coords, max_points=None):
    z = encoder(coords.gather(images), coords, max_points=max_points)
    return (z[1] if isinstance(z, tuple) else z).float()
