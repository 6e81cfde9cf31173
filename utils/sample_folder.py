"""A folder of image files, as the scripts write it, as a sequence of uint8 tensors."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.errors import UserError
from utils.files import read_json

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EIGHT_BIT_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
# What Pillow raises for a file which is no image, is cut short, or is a decompression bomb.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class SampleFolder:
    """The first `count` images of a folder and the folders below it, in order of name; all of them without count.

    Item i is the uint8 tensor [3, H, W] of image i; size is the (H, W) they share, and settings how a script of this
    project made them ({} for other folders).
    Raises UserError where the folder is missing, holds fewer images than count, or images of more than one size
    (only headers are read for that), and, when an item is read, for a file whose pixels are damaged.
    """

    def __init__(self, folder, count=None):
        self.folder = folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"samples={str(folder)!r} is not a folder; give the folder with the images to score")
        files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        self.files = sorted(path for path in files if not path.name.startswith("."))
        if not self.files:
            raise UserError(f"samples={str(folder)!r} has no images; expected files like 00000.png")
        if count is not None and len(self.files) < count:
            raise UserError(f"num_samples={count} but samples={str(folder)!r} has only {len(self.files)} images; "
                            "make more or lower num_samples")
        self.files = self.files[:count]
        self.size = _size(self.files[0])
        for path in self.files:
            size = _size(path)
            if size != self.size:
                raise UserError(f"samples={str(folder)!r} has images of different sizes, {self.files[0].name} of "
                                f"{self.size[0]}x{self.size[1]} and {path.name} of {size[0]}x{size[1]}; "
                                "keep one size per folder")

    @property
    def settings(self):
        """settings.json of the folder (utils.folder.ImageFolder)."""
        return read_json(self.folder / "settings.json")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, place):
        try:
            with Image.open(self.files[place]) as image:
                pixels = np.array(image.convert("RGB"))
        except UNREADABLE as error:
            raise _damaged(self.files[place], error) from error
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _size(path):
    try:
        with Image.open(path) as image:
            if image.mode not in EIGHT_BIT_MODES:
                raise UserError(f"image {str(path)!r} has pixels of mode {image.mode}; 8-bit grey or RGB is needed")
            return image.height, image.width
    except UserError:
        raise
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def _damaged(path, error):
    return UserError(f"image {str(path)!r} can't be read ({error}); make it again or delete it")
