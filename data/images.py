"""Image files: finding them in a folder, and reading them as 8-bit tensors."""

import os
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# Pillow's exceptions for a file that is not an image, is truncated or damaged, or is a decompression bomb.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, RuntimeError, MemoryError,
              struct.error, zlib.error, Image.DecompressionBombError)


def list_images(folder, suffixes=SUFFIXES):
    """Sorted paths, relative to `folder`, of the images in it and in the folders below. Hidden files are skipped."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in files
                  if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(found)


def read_image(source, channels=None):
    """One image as uint8 [C, H, W], turned as its EXIF orientation says.

    source    path, or binary file object
    channels  1 (grey) or 3 (RGB); None: 1 if the file is grey, else 3
    Raises one of UNREADABLE if Pillow cannot read it.
    """
    return to_tensor(_open(source, channels))


def load_image(source, size, channels):
    """Like `read_image`, but cropped about the centre to the aspect ratio of size (H, W), then resized with Lanczos."""
    return to_tensor(fit(_open(source, channels), size))


def image_size(source):
    """(H, W) of what `read_image` returns, from the file's header alone. Raises one of UNREADABLE."""
    with Image.open(source) as image:
        exif = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()  # which would decode a PNG
        sideways = exif.get(0x0112, 1) >= 5  # orientations 5 to 8 swap the axes
        return (image.width, image.height) if sideways else (image.height, image.width)


def _open(source, channels):
    with Image.open(source) as image:
        return to_mode(ImageOps.exif_transpose(image), channels or (1 if image.mode == "L" else 3))


def to_mode(image, channels):
    """The Pillow image as 8-bit grey (channels 1) or RGB (3). 16-bit pixels are scaled; Pillow would clip them."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("float pixels have no known range")
    return image.convert({1: "L", 3: "RGB"}[channels])


def fit(image, size):
    """Crop a Pillow image about its centre to the aspect ratio of size (H, W), then resize it with Lanczos.

    Cropping first keeps pixels outside the crop out of the filter's support.
    """
    height, width = size
    scale = min(image.width / width, image.height / height)
    crop_width, crop_height = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (image.width - crop_width) // 2, (image.height - crop_height) // 2
    image = image.crop((left, top, left + crop_width, top + crop_height))
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(image):
    """Pillow image of mode L or RGB as uint8 [C, H, W]."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()
