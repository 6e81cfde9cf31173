"""Windows of pictures that scikit-image ships: data sets that need no download.

The left or right third of every picture is kept for held-out windows; no training window holds a pixel of it.
"""

import functools
import importlib.util
import os

from PIL import Image

from data.datasets.base import ImageDataset
from data.images import fit, to_mode, to_tensor
from utils.errors import UserError
from utils.rng import seed_of

STEP = 0.15  # between windows, as a share of their side


class Windows(ImageDataset):
    """Square windows of pictures, in a mixed order; the class of a window is its picture. `root` is not used.

    Only windows with at least `size` pixels per side are used, because windows are never enlarged. Items are cached.
    Raises UserError for a size above that of the largest windows.
    """

    sampled = 32
    in_memory = True
    pictures = ()  # (file name, held-out end) of each
    sides = ()  # of windows, in pixels of the picture, ascending
    counts = (0, 0)  # training and held-out windows per picture, if there are so many

    def __init__(self, root, train, size, channels):
        super().__init__("scikit-image", train, size, channels)
        largest = self.sides[-1]
        if max(size) > largest:
            raise UserError(f"data.img_size={size[0]}x{size[1]} is more than the {largest}x{largest} pixels of the "
                            f"largest windows of {self.name!r}; use at most {largest}, or another data set")
        self.keys = self.windows(train, max(size))
        self._items = {}

    def read(self, index):
        """Window `index` as uint8 [C, H, W]."""
        key = name, left, top, side = self.keys[index]
        if key not in self._items:
            window = self._picture(name, self.channels).crop((left, top, left + side, top + side))
            self._items[key] = to_tensor(fit(window, self.size))
        return self._items[key].clone()

    def source_size(self, index):
        """(H, W) of window `index` in pixels of its picture."""
        return (self.keys[index][3],) * 2

    def notes(self):
        """Nothing: windows are never enlarged."""
        return ()

    def label(self, index):
        """Name of image `index` in messages."""
        return "window {1},{2} (side {3}) of {0}".format(*self.keys[index])

    def _content(self, index):
        return self.read(index).numpy().tobytes()

    def _classes(self):
        return ([os.path.splitext(key[0])[0] for key in self.keys],
                sorted(os.path.splitext(name)[0] for name, _ in self.pictures))

    @classmethod
    def windows(cls, train, smallest=0):
        """Windows of a part, (file name, left, top, side) in pixels of the picture, taking the pictures in turn.

        smallest   least side
        """
        count = cls.counts[0] if train else cls.counts[1]
        found = [cls._mixed(name, held_out_end, train, smallest)[:count] for name, held_out_end in cls.pictures]
        return [window for turn in zip(*found, strict=False) for window in turn]  # few windows are very large

    @classmethod
    @functools.cache
    def _mixed(cls, name, held_out_end, train, smallest):
        """All windows of one picture in a mixed order."""
        width, height = cls._picture(name, 3).size
        start, stop = _columns(width, held_out_end, train)
        found = {(name, left, top, side) for side in cls.sides if side >= smallest
                 for left in _places(start, stop - side, STEP * side) for top in _places(0, height - side, STEP * side)}
        return sorted(found, key=lambda window: seed_of(cls.name, *window))

    @classmethod
    def path(cls, name):
        """Path of a picture; UserError if scikit-image is missing."""
        package = importlib.util.find_spec("skimage")
        path = os.path.join(package.submodule_search_locations[0], "data", name) if package else ""
        if not os.path.isfile(path):
            raise UserError(f"data.name={cls.name!r} needs {name} of scikit-image; install it (pip install "
                            "scikit-image) or use another data set")
        return path

    @classmethod
    @functools.cache
    def _picture(cls, name, channels):
        with Image.open(cls.path(name)) as picture:
            return to_mode(picture, channels)


def _columns(width, held_out_end, train):
    """First column of a part, and the one after its last."""
    held_out = width // 3
    if held_out_end == "left":
        return (held_out, width) if train else (0, held_out)
    return (0, width - held_out) if train else (width - held_out, width)


def _places(first, last, step):
    """Integers from first to last, evenly spaced and about `step` apart."""
    count = round((last - first) / step)
    return [first + round((last - first) * i / count) for i in range(count + 1)] if count else [(first + last) // 2]


class Photos(Windows):
    """Six colour photographs of objects."""

    name = "photos"
    # motorcycle_right.png is missing because it repeats motorcycle_left.png; hubble_deep_field.jpg and ihc.png because
    # they are textures without layout
    pictures = (("astronaut.png", "left"), ("chelsea.png", "right"), ("coffee.png", "right"),
                ("motorcycle_left.png", "left"), ("retina.jpg", "right"), ("rocket.jpg", "left"))
    sides = (64, 72, 80, 90, 102, 114, 128)
    counts = (1000, 64)


class Tissue(Windows):
    """Stained tissue under a microscope (immunohistochemistry, 512²). There is no up in it: training turns windows."""

    name = "tissue"
    turns = (0, 1, 2, 3)
    pictures = (("ihc.png", "right"),)
    sides = (48, 52, 57, 62, 68, 74, 80)
    counts = (4000, 512)
