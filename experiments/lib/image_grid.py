"""Images in a grid with labelled columns, and animations."""

import torch
from PIL import Image, ImageDraw

from utils.files import replacing
from utils.images import tile, to_pil

MIN_WIDTH = 96  # pixels of an image in a grid, so that a label fits above it
LABEL_HEIGHT = 16  # pixels


def labelled_grid(columns):
    """A Pillow image with a column of images below each label.

    columns   {label: list of uint8 [C, H, W]}; every image is resized, without interpolation, to the largest size, or
              to a multiple of it that is at least MIN_WIDTH wide
    """
    columns = {label: [to_pil(image) for image in images] for label, images in columns.items()}
    width, height = map(max, zip(*(image.size for images in columns.values() for image in images), strict=True))
    factor = -(-MIN_WIDTH // width)
    cell = (width * factor, height * factor)
    rows = max(map(len, columns.values()))
    grid = Image.new("RGB", (cell[0] * len(columns), LABEL_HEIGHT + cell[1] * rows), "white")
    draw = ImageDraw.Draw(grid)
    for column, (label, images) in enumerate(columns.items()):
        draw.text((column * cell[0] + 3, 2), label, fill="black")
        for row, image in enumerate(images):
            place = (column * cell[0], LABEL_HEIGHT + row * cell[1])
            grid.paste(image.resize(cell, Image.Resampling.NEAREST), place)
    return grid


def save_grid(columns, path):
    """Write `labelled_grid` as a PNG."""
    with replacing(path) as temporary:
        labelled_grid(columns).save(temporary, format="PNG")


def save_gif(frames, path, columns, milliseconds=120):
    """Write an animation that runs forward and backward in a loop.

    frames   list of lists of uint8 images [C, H, W]; those of a frame are tiled in so many columns, and enlarged to at
             least MIN_WIDTH
    """
    factor = -(-MIN_WIDTH // frames[0][0].shape[2])
    tiled = [to_pil(tile(torch.stack(images), columns)) for images in frames]
    frames = [frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)
              for frame in [*tiled, *tiled[-2:0:-1]]]
    with replacing(path) as temporary:
        frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
