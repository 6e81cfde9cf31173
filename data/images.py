"""From an encoded image to a uint8 tensor of the wanted size."""

import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps

# Everything that Pillow raises for a file which is no image, is cut short, or is a decompression bomb.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def load_image(source, size, channels):
    """One image as uint8 [C, H, W].

    source    path, or binary file object
    size      (H, W); the image is cropped to this aspect ratio about its centre, then resized with Lanczos
    channels  1 (grey) or 3 (RGB)
    Raises one of UNREADABLE where Pillow cannot read it.
    """
    with Image.open(source) as image:
        return to_tensor(fit(to_mode(ImageOps.exif_transpose(image), channels), size))


def to_mode(image, channels):
    """The Pillow image as 8-bit grey (channels 1) or RGB (3). 16-bit pixels are scaled; Pillow would clip them."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("float pixels have no known range")
    return image.convert({1: "L", 3: "RGB"}[channels])


def fit(image, size):
    """Crop a Pillow image about its centre to the aspect ratio of size (H, W), then resize it with Lanczos.

    Cropping comes first, so that no pixel outside the crop enters through the support of the filter.
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
