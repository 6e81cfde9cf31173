"""Walks through the latent space as pictures: rendered into a folder, shown as a sheet, strips and an animation."""

from pathlib import Path

import torch

from diffusion.generate import decode
from diffusion.samplers import ddim
from utils.images import read_image, save_png, tile
from utils.sheet import save_gif, save_sheet


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
