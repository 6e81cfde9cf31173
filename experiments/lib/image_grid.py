"""Pictures of results: images in labelled columns, and animations."""

import torch
from PIL import Image, ImageDraw

from utils.files import replacing
from utils.images import tile, to_pil

SMALLEST = 96  # pixels of an image on a sheet, so that labels fit
HEADING = 16  # pixels above the columns


def labelled_sheet(columns):
    """A Pillow image with a column of images under each label.

    columns   {label: list of uint8 [C, H, W]}; all are shown as large as the largest, or SMALLEST, pixel by pixel
    """
    height, width = (max(image.shape[dim] for images in columns.values() for image in images) for dim in (1, 2))
    factor = -(-SMALLEST // width)
    cell = (width * factor, height * factor)
    sheet = Image.new("RGB", (cell[0] * len(columns), HEADING + cell[1] * max(map(len, columns.values()))), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (label, images) in enumerate(columns.items()):
        draw.text((column * cell[0] + 3, 2), label, fill="black")
        for row, image in enumerate(images):
            place = (column * cell[0], HEADING + row * cell[1])
            sheet.paste(to_pil(image).resize(cell, Image.Resampling.NEAREST), place)
    return sheet


def save_sheet(columns, path):
    """Write `labelled_sheet` as a PNG; the file appears whole or not at all."""
    with replacing(path) as temporary:
        labelled_sheet(columns).save(temporary, format="PNG")


def save_gif(frames, path, columns, milliseconds=120):
    """Write an animation that runs to the end and back, for ever.

    frames   list of lists of uint8 images [C, H, W], shown together in so many columns, enlarged as on a sheet
    """
    factor = -(-SMALLEST // frames[0][0].shape[2])
    tiled = [to_pil(tile(torch.stack(images), columns)) for images in frames]
    frames = [frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)
              for frame in [*tiled, *tiled[-2:0:-1]]]
    with replacing(path) as temporary:
        frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
