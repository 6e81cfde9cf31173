"""Sampling a window of a large image at the cost of the window; the rest takes part at the training resolution.

Two states of one image are sampled in lockstep from the same noise function: the whole image at the training
resolution, and the pixels of the window in the large image (docs/method.md, 5.4). At every step the whole provides the
output of the grid U-Net, the only information that points have about distant ones. Its state, interpolated by the
cosines of the DCT, also stands for the pixels around the window that the sparse layers and the Wiener filter read.
The result differs from the same window of the large image in two respects: the network treats the whole differently at
the two resolutions, and details around the window that the training resolution cannot represent are missing.
"""

import functools
import math
import sys

import torch

from diffusion.mollifier import GaussianMollifier, dct_matrix, mollified_cosines
from diffusion.samplers import sample
from diffusion.sampling import UNGUIDED, guided
from models.large_images import Window
from utils.errors import UserError

# Distances in sigma. MARGIN: how far the window's own state extends, for mollified predictions and for the details that
# the Wiener filter reads. SURROUNDINGS: how far the state of the whole extends, as the filter's response decays as
# exp(-0.6 d).
MARGIN, SURROUNDINGS = 4, 24


def check_window(diffusion):
    """UserError without a mollifier: noise at two resolutions then has nothing in common."""
    if diffusion.mollifier.is_identity:
        raise UserError("--window needs a model with diffusion.gaussian_filter_std above 0; sample the whole image")


@torch.no_grad()
def decode_window(decoder, diffusion, z, size, window, generators=None, channels=3, eta=0.0, progress=None,
                  max_points=None, condition=None, guidance=UNGUIDED):
    """A window of the images that diffusion.sampling.decode returns for z [B, Z], float32 [B, C, h, w] in [-1, 1].

    window       ((top, bottom), (left, right)) in an image of `size` (H, W); other arguments as in decode
    """
    max_points = max_points or sys.maxsize
    inner = _regions(decoder, diffusion, Window(1, size, *window))[0]
    at_once = max(max_points // max(inner.num_points, math.prod(diffusion.mollifier.train_size)), 1)
    images = []
    for first in range(0, len(z), at_once):
        latents = z[first : first + at_once]
        part = Window(len(latents), size, *window, z.device)
        streams = generators and generators[first : first + at_once]
        network = guided(decoder, condition if condition is None else condition[first : first + at_once], guidance)
        regions = _regions(decoder, diffusion, part)
        coarse = _Coarse(network, diffusion, latents, max_points)
        fine = _Fine(network, diffusion, regions, latents, max_points, coarse)
        paths = [sample(side.diffusion.denoiser(side.predict, side.coords), _start(side, channels, own),
                        side.diffusion, own, eta)
                 for side, own in ((coarse, streams), (fine, _copies(streams)))]
        for (_, whole), (_, state) in zip(*paths, strict=True):
            if progress:
                progress(len(latents) / len(z))
        images.append(fine.sharpened(whole, state, part).clamp(-1, 1))
    return torch.cat(images)


class _Coarse:
    """The whole image at the training resolution; keeps the values and grid features of the current step."""

    def __init__(self, decoder, diffusion, z, max_points):
        self.decoder, self.diffusion, self.z, self.max_points = decoder, diffusion, z, max_points
        self.coords = Window.whole(len(z), diffusion.mollifier.train_size, z.device)

    def predict(self, values, t):
        """values [B, L, C] -> the prediction [B, L, C]."""
        self.values = values
        self.grid = self.decoder.grid_features(values, t, self.z, self.coords, max_points=self.max_points)
        return self.decoder(values, t, self.z, self.coords, grid=self.grid, max_points=self.max_points)


class _Fine:
    """The window with its margin in the large image; each of its steps follows one of the whole."""

    def __init__(self, decoder, diffusion, regions, z, max_points, coarse):
        self.decoder, self.z, self.max_points, self.coarse = decoder, z, max_points, coarse
        self.coords, self.field, self.surroundings = regions
        self.diffusion = diffusion.with_mollifier(_WindowMollifier(diffusion.mollifier, self.coords))

    def predict(self, values, t):
        """values [B, L, C] -> the prediction [B, L, C] of the decoder, which also sees the receptive field around."""
        values = self._surrounded(self.coarse.coords.scatter(self.coarse.values), values, self.field)
        out = self.decoder(values, t, self.z, self.field, grid=self.coarse.grid, max_points=self.max_points)
        return self.coords.take(out, self.field)

    def sharpened(self, whole, state, window):
        """The sharpened window, from the last states of the whole [B, C, R, R] and of the window [B, C, h, w]."""
        values = self._surrounded(whole, self.coords.gather(state), self.surroundings)
        mollifier = _WindowMollifier(self.coarse.diffusion.mollifier, self.surroundings)
        return mollifier.sharpen(self.surroundings.scatter(values))[(..., *window.within(self.surroundings))]

    def _surrounded(self, whole, values, outer):
        """Values [B, L, C] at `outer`: those of the window inside, the interpolated state of the whole around it."""
        image = outer.gather(_interpolate(whole, outer)).contiguous()
        self.coords.put(values, outer, image)
        return image


def _start(side, channels, generators):
    like = torch.empty(side.coords.batch, channels, *side.coords.size, device=side.coords.device)
    return side.diffusion.mollifier.noise_like(like, generators)


def _regions(decoder, diffusion, window):
    """Three growing windows: with the margin of the state, with the receptive field around it, and with all that the
    Wiener filter reads."""
    whole = diffusion.mollifier
    blocks = [*decoder.points_to_grid.blocks, *decoder.blocks]
    halo = [sum(halves) for halves in zip(*(block.halo(window.image_size) for block in blocks), strict=True)]
    sigma = [whole.sigma * length / train for length, train in zip(window.image_size, whole.train_size, strict=True)]
    inner = window.grown([math.ceil(MARGIN * pixels) for pixels in sigma])
    return inner, inner.grown(halo), inner.grown([math.ceil((SURROUNDINGS - MARGIN) * pixels) for pixels in sigma])


class _WindowMollifier(GaussianMollifier):
    """The mollifier of a large image, applied at a window of it.

    Noise is exact; blurring and sharpening are exact far from borders of the window that are not borders of the image.
    """

    def __init__(self, whole, window):
        share = (length / total for length, total in zip(window.size, window.image_size, strict=True))
        train_size = tuple(length * part for length, part in zip(whole.train_size, share, strict=True))
        super().__init__(whole.sigma, train_size, whole.wiener_eps)
        self.whole, self.window = whole, window
        self.noise_variance = whole.noise_variance

    def noise_like(self, x, generator=None):
        places = slice(*self.window.rows), slice(*self.window.columns)
        return self.whole.noise_at(x, self.window.image_size, places, generator)


def _copies(generators):
    """Copies of the generators in their current state."""
    return generators and [torch.Generator(one.device).set_state(one.get_state()) for one in generators]


def _interpolate(image, window):
    """The whole image [B, C, R, R] at the pixels of a window, [B, C, h, w], by cosine interpolation."""
    rows, columns = (_cosine_matrix(span, length, known, image.device, image.dtype) for span, length, known in
                     zip((window.rows, window.columns), window.image_size, image.shape[-2:], strict=True))
    with torch.autocast(image.device.type, enabled=False):
        return rows @ image @ columns.T


@functools.lru_cache(maxsize=8)
def _cosine_matrix(span, length, known, device, dtype):
    position = (torch.arange(*span, dtype=torch.float64) + 0.5) / length
    basis = mollified_cosines(position, known, 0.0, known**-0.5)
    return (basis @ dct_matrix(known, torch.device("cpu"), torch.float64)).to(device, dtype)
