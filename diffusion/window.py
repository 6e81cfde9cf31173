"""A window of a large image at the cost of the window: the rest of the image takes part at the training resolution.

Two states of one image go through the sampler in lockstep, both from the same noise function: the whole at the training
resolution, and the pixels of the window in the large image. At every step the whole gives the output of the grid
U-Net, which is all that points know of those far from them, and its state, interpolated with the cosines of the DCT,
stands for the pixels around the window that the sparse layers reach, and in the end the Wiener filter. So the result
differs from the same window of the large image by what the network makes of the whole differently at the two
resolutions, and by details around the window that the training resolution cannot hold.
"""

import copy
import functools
import math
import sys

import torch

from diffusion.mollifier import GaussianMollifier, dct_matrix, mollified_cosines
from diffusion.samplers import sample
from models.large_images import Window
from utils.errors import UserError

# Distances from the window, in sigma: its state reaches so far, for the mollifier of predictions and the details that
# the Wiener filter sees, and the state of the whole that surrounds it, as the filter's response falls by exp(-0.6 d).
MARGIN, SURROUNDINGS = 4, 24


def check_window(diffusion):
    """UserError where windows cannot be sampled: without a mollifier noise at two resolutions has nothing in common."""
    if diffusion.mollifier.is_identity:
        raise UserError("--window needs a model with diffusion.gaussian_filter_std above 0: without a mollifier the "
                        "whole at the training resolution tells nothing of the window; sample the whole image")


@torch.no_grad()
def decode_window(decoder, diffusion, z, size, window, sampler="ddim", generators=None, channels=3, eta=0.0,
                  progress=None, max_points=None):
    """A window of what diffusion.sampling.decode makes of latents z [B, Z], float32 [B, C, h, w] in [−1, 1].

    window       ((top, bottom), (left, right)) of the image of `size` (H, W); the other arguments are those of decode
    """
    max_points = max_points or sys.maxsize
    inner, _ = _surroundings(decoder, diffusion, Window(1, size, *window))
    at_once = max(max_points // max(inner.num_points, math.prod(diffusion.mollifier.train_size)), 1)
    images = []
    for first in range(0, len(z), at_once):
        latents = z[first : first + at_once]
        part = Window(len(latents), size, *window, z.device)
        streams = generators and generators[first : first + at_once]
        coarse = _Coarse(decoder, diffusion, latents, max_points)
        fine = _Fine(decoder, diffusion, part, latents, max_points, coarse)
        paths = [sample(sampler, side.diffusion.denoiser(side.predict, side.coords), _start(side, channels, own),
                        side.diffusion, own, eta)
                 for side, own in ((coarse, streams), (fine, _copies(streams)))]
        for (_, whole), (_, state) in zip(*paths, strict=True):
            if progress:
                progress(len(latents) / len(z))
        images.append(fine.sharpened(whole, state, part).clamp(-1, 1))
    return torch.cat(images)


class _Coarse:
    """The whole image at the training resolution, and the grid features at the present step."""

    def __init__(self, decoder, diffusion, z, max_points):
        self.decoder, self.diffusion, self.z, self.max_points = decoder, diffusion, z, max_points
        self.coords = Window.whole(len(z), diffusion.mollifier.train_size, z.device)

    def predict(self, values, t):
        """values [B, L, C] -> the prediction [B, L, C], keeping values and grid features for the window."""
        self.values = values
        self.grid = self.decoder.grid_features(values, t, self.z, self.coords, self.max_points)
        return self.decoder(values, t, self.z, self.coords, self.grid, self.max_points)


class _Fine:
    """The window and a margin around it, in the large image; each of its steps follows one of the whole."""

    def __init__(self, decoder, diffusion, window, z, max_points, coarse):
        self.decoder, self.z, self.max_points, self.coarse = decoder, z, max_points, coarse
        self.coords, self.surroundings = _surroundings(decoder, diffusion, window)
        self.diffusion = _with_mollifier(diffusion, _WindowMollifier(diffusion.mollifier, self.coords))

    def predict(self, values, t):
        """values [B, L, C] -> the prediction [B, L, C], by a decoder that also sees the surroundings of the window."""
        values = self._surrounded(self.coarse.coords.scatter(self.coarse.values), values)
        out = self.decoder(values, t, self.z, self.surroundings, self.coarse.grid, self.max_points)
        return self.coords.take(out, self.surroundings)

    def sharpened(self, whole, state, window):
        """The window of the image whose mollified states are these, whole [B, C, R, R] and state [B, C, h, w]."""
        values = self._surrounded(whole, self.coords.gather(state))
        mollifier = _WindowMollifier(self.coarse.diffusion.mollifier, self.surroundings)
        return mollifier.sharpen(self.surroundings.scatter(values))[(..., *window.within(self.surroundings))]

    def _surrounded(self, whole, values):
        """Values [B, L, C] at the window among those of its surroundings, from the state of the whole."""
        image = self.surroundings.gather(_interpolate(whole, self.surroundings)).contiguous()
        self.coords.put(values, self.surroundings, image)
        return image


def _start(side, channels, generators):
    like = torch.empty(side.coords.batch, channels, *side.coords.size, device=side.coords.device)
    return side.diffusion.mollifier.noise_like(like, generators)


def _surroundings(decoder, diffusion, window):
    """The window with the margin in which its state is computed, and with all that is seen around that."""
    whole = diffusion.mollifier
    blocks = [*decoder.points_to_grid.blocks, *decoder.blocks]
    reach = (sum(halves) for halves in zip(*(block.halo(window.image_size) for block in blocks), strict=True))
    sigma = [whole.sigma * length / train for length, train in zip(window.image_size, whole.train_size, strict=True)]
    inner = window.grown([math.ceil(MARGIN * pixels) for pixels in sigma])
    return inner, inner.grown([max(halo, math.ceil((SURROUNDINGS - MARGIN) * pixels)) for halo, pixels in
                               zip(reach, sigma, strict=True)])


class _WindowMollifier(GaussianMollifier):
    """The mollifier of a large image at a window of it: noise is exact, blurring and sharpening where the border of the
    window is far or is that of the image."""

    def __init__(self, whole, window):
        share = (length / total for length, total in zip(window.size, window.image_size, strict=True))
        train_size = tuple(length * part for length, part in zip(whole.train_size, share, strict=True))
        super().__init__(whole.sigma, train_size, whole.wiener_eps)
        self.whole, self.window = whole, window
        self.noise_variance = whole.noise_variance

    def noise_like(self, x, generator=None):
        places = slice(*self.window.rows), slice(*self.window.columns)
        return self.whole.noise_at(x, self.window.image_size, places, generator)


def _with_mollifier(diffusion, mollifier):
    """The same diffusion with another mollifier."""
    diffusion, parameterisation = copy.copy(diffusion), copy.copy(diffusion.parameterisation)
    diffusion.mollifier = parameterisation.mollifier = mollifier
    diffusion.parameterisation = parameterisation
    return diffusion


def _copies(generators):
    """Generators that draw what the given ones will."""
    return generators and [torch.Generator(one.device).set_state(one.get_state()) for one in generators]


def _interpolate(image, window):
    """image [B, C, R, R] of the whole at the pixels of a window, [B, C, h, w], by its cosines."""
    rows, columns = (_cosine_matrix(span, length, known, image.device, image.dtype) for span, length, known in
                     zip((window.rows, window.columns), window.image_size, image.shape[-2:], strict=True))
    with torch.autocast(image.device.type, enabled=False):
        return rows @ image @ columns.T


@functools.lru_cache(maxsize=8)
def _cosine_matrix(span, length, known, device, dtype):
    position = (torch.arange(*span, dtype=torch.float64) + 0.5) / length
    basis = mollified_cosines(position, known, 0.0, known**-0.5)
    return (basis @ dct_matrix(known, torch.device("cpu"), torch.float64)).to(device, dtype)
