"""Paths through the space of latents or states (docs/method.md, 6.3): great circles and principal directions.

Also their images: rendered into a folder, and shown as a grid, strips and an animation.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from data.images import read_image
from diffusion.samplers import sample
from experiments.lib.plots import save_gif, save_grid
from utils.images import save_png, tile


def slerp(a, b, weight):
    """Spherical interpolation from a (weight 0) to b (weight 1), both [B, ...]; weight is a number or [B].

    Follows the great circle through a and b at constant speed (Shoemake 1985). Interpolated vectors keep the norm if a
    and b have the same, as draws from a normal distribution in many dimensions nearly do. Linear for parallel vectors.
    """
    weight, cosine = (values.view(-1, *[1] * (a.dim() - 1)) for values in (
        torch.as_tensor(weight, dtype=a.dtype, device=a.device), (_unit(a) * _unit(b)).sum(1).clamp(-1, 1)))
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    straight = sine < 1e-3
    first, second = (torch.where(straight, part, torch.sin(part * angle) / torch.where(straight, 1.0, sine))
                     for part in (1 - weight, weight))
    return first * a + second * b


def _unit(x):
    return torch.nn.functional.normalize(x.flatten(1), dim=1)


def between(a, b, count, centre=0.0):
    """`count` vectors [count, ...] from a to b, both [...], ends included, by slerp about `centre`."""
    a, b = ((end - centre).expand(count, *end.shape) for end in (a, b))
    return centre + slerp(a, b, torch.linspace(0, 1, count))


class PrincipalDirections(NamedTuple):
    """Directions of the largest variance of latents, in descending order.

    mean        [Z] of the latents
    directions  [K, Z], orthonormal; the largest component of each is positive
    std         [K], standard deviation of the latents along each
    share       [K], share of each in the total variance
    """

    mean: torch.Tensor
    directions: torch.Tensor
    std: torch.Tensor
    share: torch.Tensor


def principal_directions(latents, count):
    """The first `count` PrincipalDirections of latents [N, Z], float32; computed in float64."""
    mean = latents.double().mean(0)
    variance, vectors = torch.linalg.eigh(torch.cov((latents.double() - mean).T, correction=0))
    variance, vectors = variance.flip(0).clamp(min=0), vectors.flip(1).T  # eigh sorts ascending
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    share = variance / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)
    columns = (values[:count].float() for values in (vectors * largest.sign(), variance.sqrt(), share))
    return PrincipalDirections(mean.float(), *columns)


def along(z, direction, reach, count):
    """`count` latents [count, Z] on the line from z − reach · direction to z + reach · direction, both [Z]."""
    return z + torch.linspace(-reach, reach, count, device=z.device)[:, None] * direction


def render(folder, paths, autoencoder):
    """Fill an ImageFolder with the images of all paths, one after another, by a TrainedAutoencoder.

    paths    list of (z [F, Z], x [F, C, H, W], int64 [F]): latents, first states of the chain, and the images or
             samples whose conditions they take
    """
    points = [point for path in paths for point in zip(*path, strict=True)]
    for indices, progress in folder.missing_batches(autoencoder.cfg.train.sample_size, autoencoder.steps):
        z, x, images = (torch.stack(parts) for parts in zip(*(points[i] for i in indices), strict=True))
        folder.save(indices, autoencoder.decode(
            z, x.shape[-2:], progress=progress, condition=autoencoder.condition(images),
            path=lambda denoise, _, x=x: sample(denoise, x, autoencoder.diffusion)))


def show(folder, labels, columns, before=None, after=None):
    """Write <folder>.png with a row for each path, <folder>.gif, and each row alone as <folder>_strips/00000.png, ….

    labels         of the images of a path, in order
    columns        of the animation, which shows all paths side by side
    before, after  (label, one uint8 image for each path) to show at either end of the grid
    """
    length = len(labels)
    images = [read_image(folder.file(i)) for i in range(folder.total)]
    paths = [images[first:first + length] for first in range(0, len(images), length)]
    frames = [list(frame) for frame in zip(*paths, strict=True)]
    shown = [column for column in (before, *zip(labels, frames, strict=True), after) if column is not None]
    save_grid(dict(shown), folder.path.with_suffix(".png"))
    save_gif(frames, folder.path.with_suffix(".gif"), columns)
    for i, path in enumerate(paths):
        save_png(tile(torch.stack(path), length), Path(f"{folder.path}_strips") / f"{i:05d}.png")
