"""Conversion of tensors to image files."""

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.files import replacing

CHANNELS = "channels side by side"  # key of a PNG's text chunk with their number


def to_uint8(images):
    """[-1, 1] float [..., C, H, W] to 8 bits, rounded (not floored) and clipped, on the CPU."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def to_pil(image):
    """One uint8 image [C, H, W] as a Pillow image: RGB for 3 channels, else grey, with the channels side by side."""
    if len(image) == 3:
        return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return Image.fromarray(torch.cat([*image], dim=1).numpy())


def save_png(image, path):
    """Write one uint8 image [C, H, W], of which data.images.read_image returns all channels; the file appears whole or
    not at all."""
    info = PngInfo()
    if len(image) not in (1, 3):
        info.add_text(CHANNELS, str(len(image)))
    with replacing(path) as temporary:
        to_pil(image).save(temporary, format="PNG", pnginfo=info)


def tile(images, columns):
    """uint8 images [N, C, H, W] as one image [C, rows · H, columns · W]; empty cells are white."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid = images.new_full((rows * columns, channels, height, width), 255)
    grid[:count] = images
    grid = grid.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)
