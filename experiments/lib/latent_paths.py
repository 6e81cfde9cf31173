"""Ways through the space of latents, or of states: along great circles, and along the directions in which data vary.

Walks through the latent space as pictures: rendered into a folder, shown as a sheet, strips and an animation.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from data.images import read_image
from diffusion.samplers import ddim
from diffusion.sampling import decode
from experiments.lib.image_grid import save_gif, save_sheet
from utils.images import save_png, tile


def slerp(a, b, weight):
    """Spherical interpolation from a (weight 0) to b (weight 1), both [B, ...]; weight is a number or [B].

    Along the great circle through both at constant speed, so that between vectors of one norm all have that norm, as
    draws from a normal distribution in many dimensions do (Shoemake 1985). Where they are parallel it is linear.
    """
    weight, cosine = (values.view(-1, *[1] * (a.dim() - 1)) for values in (
        torch.as_tensor(weight, dtype=a.dtype, device=a.device), (_unit(a) * _unit(b)).sum(1).clamp(-1, 1)))
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    straight = sine < 1e-3
    first, second = (torch.where(straight, part, torch.sin(part * angle) / torch.where(straight, 1.0, sine))
                     for part in (1 - weight, weight))
    return first * a + second * b


def between(a, b, count, centre=0.0):
    """`count` vectors [count, ...] from a to b, [...] each, ends included: on the way of slerp, about `centre`."""
    a, b = ((end - centre).expand(count, *end.shape) for end in (a, b))
    return centre + slerp(a, b, torch.linspace(0, 1, count))


class PrincipalDirections(NamedTuple):
    """In which directions latents vary most, in falling order.

    mean       [Z] of the latents
    directions [K, Z], orthonormal; the largest component of each is positive
    std        [K], standard deviation of the latents along each
    share      [K] of the total variance
    """

    mean: torch.Tensor
    directions: torch.Tensor
    std: torch.Tensor
    share: torch.Tensor


def principal_directions(latents, count):
    """The first `count` PrincipalDirections of latents [N, Z], float32; computed in float64."""
    mean = latents.double().mean(0)
    variance, vectors = torch.linalg.eigh(torch.cov((latents.double() - mean).T, correction=0))
    variance, vectors = variance.flip(0).clamp(min=0), vectors.flip(1).T  # they come in rising order
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    share = variance / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)
    found = mean, vectors * largest.sign(), variance.sqrt(), share
    return PrincipalDirections(found[0].float(), *(values[:count].float() for values in found[1:]))


def along(z, direction, reach, count):
    """`count` latents [count, Z] on the line from z − reach · direction to z + reach · direction, both [Z]."""
    return z + torch.linspace(-reach, reach, count, device=z.device)[:, None] * direction


def _unit(x):
    return torch.nn.functional.normalize(x.flatten(1), dim=1)


def render(folder, walks, decoder, diffusion, batch_size, max_points):
    """Fill an ImageFolder with the images of all walks, one after another; those that are there already are kept.

    walks    list of (z [F, Z], x [F, C, H, W]): latents, and states that DDIM starts from
    """
    steps = [(z, x) for walk in walks for z, x in zip(*walk, strict=True)]
    for indices, progress in folder.missing_batches(batch_size, diffusion.num_steps):
        z, x = (torch.stack(parts) for parts in zip(*(steps[i] for i in indices), strict=True))
        images = decode(decoder, diffusion, z, x.shape[-2:], progress=progress, max_points=max_points,
                        path=lambda denoise, _, x=x: ddim(denoise, x, diffusion.schedule))
        folder.save(indices, images)


def show(folder, labels, columns, before=None, after=None):
    """Write <folder>.png, a row for each walk, <folder>.gif, and each row alone as <folder>_strips/00000.png, ….

    labels         of the images of a walk, in order
    columns        of the animation, which shows all walks side by side
    before, after  (label, one uint8 image for each walk) to show at either end of the sheet
    """
    length = len(labels)
    images = [read_image(folder.file(i)) for i in range(folder.total)]
    walks = [images[first:first + length] for first in range(0, len(images), length)]
    frames = [list(step) for step in zip(*walks, strict=True)]
    shown = [end for end in (before, *zip(labels, frames, strict=True), after) if end is not None]
    save_sheet(dict(shown), folder.path.with_suffix(".png"))
    save_gif(frames, folder.path.with_suffix(".gif"), columns)
    for i, walk in enumerate(walks):
        save_png(tile(torch.stack(walk), length), Path(f"{folder.path}_strips") / f"{i:05d}.png")
