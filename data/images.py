"""Image files: finding them in a folder, and reading them as 8-bit tensors."""

import os
import struct
import zlib
from collections import Counter

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from utils.images import CHANNELS

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
WHITE = "white"
DARK = 1 / 16  # brightest pixel, as a share of white, below which the declared white of deep pixels is doubted

PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # a colour profile of more than Pillow's 1 MB is no reason to refuse an image

# Pillow's exceptions for a file that is not an image, is truncated or damaged, or is a decompression bomb.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, RuntimeError, MemoryError,
              struct.error, zlib.error, Image.DecompressionBombError)


def list_images(folder, suffixes=SUFFIXES):
    """(sorted paths, relative to `folder`, of the images in it and in the folders below, Counter of what is left out).

    Links are followed, to each folder once. Hidden files and folders are skipped without being counted.
    """
    found, left_out = [], Counter()
    _list(os.fspath(folder), "", suffixes, {os.path.realpath(folder)}, found, left_out)
    return sorted(found), left_out


def _list(folder, prefix, suffixes, seen, found, left_out):
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        left_out["folders that cannot be read"] += 1
        return
    for entry in (entry for entry in entries if not entry.name.startswith(".")):
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in seen:
                seen.add(real)
                _list(entry.path, os.path.join(prefix, entry.name), suffixes, seen, found, left_out)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out["links that lead nowhere"] += 1
        elif not entry.name.lower().endswith(suffixes):
            left_out[f"{os.path.splitext(entry.name)[1] or 'other'} files"] += 1
        else:
            found.append(os.path.join(prefix, entry.name))


def in_words(left_out):
    """A Counter of `list_images` as text."""
    return ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))


def read_image(source, channels=None, background=WHITE, white_level=0.0):
    """One image as uint8 [C, H, W], turned as its EXIF orientation says.

    source       path, or binary file object
    channels     1 (grey) or 3 (RGB); None: 1 if the file is grey, else 3. Files of utils.images.save_png with another
                 number of channels have that number
    background   colour under transparent pixels, a name or code that Pillow knows
    white_level  white in grey images of more than 8 bits; 0: as the file declares
    Raises one of UNREADABLE if the file cannot be read, or if white is unknown.
    """
    image = _open(source, channels, background, white_level)
    beside, pixels = _channels_beside(image), to_tensor(image)
    if channels not in (None, 1, 3, beside):
        raise ValueError(f"it does not hold {channels} channels")
    return pixels if beside == 1 else torch.stack(pixels[0].chunk(beside, dim=-1))


def load_image(source, size, channels, background=WHITE, white_level=0.0):
    """Like `read_image`, but cropped about the centre to the aspect ratio of size (H, W), then resized with Lanczos."""
    return to_tensor(fit(_open(source, channels, background, white_level), size))


def read_header(source):
    """((H, W) of what `read_image` returns, True if there is transparency), without decoding the pixels.

    Raises one of UNREADABLE.
    """
    with Image.open(source) as image:
        decodes = image.format == "PNG" and "exif" not in image.info  # to look for EXIF data behind the pixels
        # Pillow's size of a TIFF takes the orientation into account in some versions
        width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
        sideways = not decodes and _orientation(image) >= 5  # which swaps the axes
        width //= _channels_beside(image)
        return (width, height) if sideways else (height, width), image.has_transparency_data


def _channels_beside(image):
    """The number of channels that utils.images.save_png put side by side."""
    return int(image.info.get(CHANNELS, 1))


def _open(source, channels, background, white_level):
    with Image.open(source) as image:
        white = white_level or _declared_white(image)
        image.load()  # turns a TIFF
        if _orientation(image) > 1:
            image = ImageOps.exif_transpose(image)
    if _is_deep(image):
        image = _scaled(image, white, declared=not white_level)
    return to_mode(image, channels or (1 if image.mode == "L" else 3), background)


def _orientation(image):
    """Orientation in the EXIF data, 1 (upright) to 8; 1 if they are missing or damaged."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:
        return 1
    return found if found in range(1, 9) else 1


def _is_deep(image):
    """True for grey pixels of more than 8 bits. Pillow reads deep colour as 8 bits itself."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _declared_white(image):
    """White of deep grey pixels as the file declares it; None if it does not."""
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (0,))[0]
        maximum = image.tag_v2.get(281)  # MaxSampleValue
        if maximum:
            return maximum[0] if isinstance(maximum, tuple) else maximum
        return 2**bits - 1 if 8 < bits <= 16 else None
    return 65535 if image.mode != "F" else None  # PNG; and Pillow scales the formats that state their maximum to this


def _scaled(image, white, declared):
    """Deep grey pixels as 8 bits, 0 to `white` becoming 0 to 255."""
    if white is None:
        raise ValueError(f"the file does not say which value of its {image.mode} pixels is white; set data.white_level")
    pixels = np.asarray(image, dtype=np.float64)
    if declared and 0 < pixels.max() < DARK * white:
        raise ValueError(f"its brightest pixel is {pixels.max():g}, though white is {white} in this file; set "
                         "data.white_level")
    return Image.fromarray((pixels * (255 / white)).round().clip(0, 255).astype(np.uint8))


def to_mode(image, channels, background=WHITE):
    """The Pillow image of 8-bit pixels as grey (channels 1) or RGB (3), on the background if it is transparent."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return image.convert("RGB" if channels == 3 else "L")


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
