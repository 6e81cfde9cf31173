"""Windows of the photographs that come with scikit-image: a data set that needs no download.

A third of every photograph, at its left or right, is kept for held-out windows; no pixel of it is in a training window.
"""

import functools
import importlib.util
import os

from PIL import Image

from data.datasets.base import ImageDataset
from data.images import fit, to_mode, to_tensor
from utils.errors import UserError
from utils.rng import seed_of

# Photographs of things in colour, each with the end that is held out. motorcycle_right.png is left out because it shows
# what motorcycle_left.png does; hubble_deep_field.jpg and ihc.png because they are texture, without layout.
PHOTOS = (
    ("astronaut.png", "left"),
    ("chelsea.png", "right"),
    ("coffee.png", "right"),
    ("motorcycle_left.png", "left"),
    ("retina.jpg", "right"),
    ("rocket.jpg", "left"),
)
SMALLEST = 128  # pixels of the side of a window; windows are never enlarged, so it is also the largest img_size
# Sides of windows as shares of the largest that fits; many large ones, since a small window has more places to be.
TRAIN_SIDES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45)
HELD_OUT_SIDES = (1.0, 0.93, 0.86)
STEP = 0.1  # between windows, as a share of their side
TRAIN_WINDOWS, HELD_OUT_WINDOWS = 400, 64  # of each photograph
CACHE_BYTES = 512 * 2**20


class Photos(ImageDataset):
    """Square windows of the photographs, in an order that mixes them. `root` is not used.

    Items are kept in memory where all of them fit into 512 MB. Raises UserError for a size above SMALLEST.
    """

    name = "photos"

    def __init__(self, root, train, size, channels):
        super().__init__("scikit-image", train, size, channels)
        if max(size) > SMALLEST:
            raise UserError(f"data.img_size={size[0]}x{size[1]} is more than the {SMALLEST}x{SMALLEST} pixels that the "
                            f"smallest window of 'photos' holds; use at most {SMALLEST}, or another data set")
        self.keys = windows(train)
        self.in_memory = len(self) * channels * size[0] * size[1] <= CACHE_BYTES
        self._items = {}

    def read(self, index):
        """Window `index` as uint8 [C, H, W]."""
        if index not in self._items:
            name, left, top, side = self.keys[index]
            window = _photo(name, self.channels).crop((left, top, left + side, top + side))
            item = to_tensor(fit(window, self.size))
            if not self.in_memory:
                return item
            self._items[index] = item
        return self._items[index].clone()

    def label(self, index):
        """What to call image `index` in a message."""
        return "window {1},{2} (side {3}) of {0}".format(*self.keys[index])

    def _version(self):
        yield from ((name, os.path.getsize(_path(name))) for name, _ in PHOTOS)
        yield from self.keys


def windows(train):
    """Windows of a part, (file name, left, top, side) in pixels of the photograph, from each photograph in turn."""
    found = []
    for name, held_out_end in PHOTOS:
        with Image.open(_path(name)) as photo:
            width, height = photo.size
        start, stop = _columns(width, held_out_end, train)
        largest = min(stop - start, height)
        of_photo = set()
        side = SMALLEST
        for n in range(30):
            side = round(SMALLEST * 1.1**n)
            if side > min(largest, 200): break
            of_photo |= {(name, left, top, side) for left in _places(start, stop - side, STEP * side)
                         for top in _places(0, height - side, STEP * side)}
        mixed = sorted(of_photo, key=lambda window: seed_of("photos", *window))
        found.append(mixed[:TRAIN_WINDOWS if train else HELD_OUT_WINDOWS])
    return [window for turn in zip(*found, strict=True) for window in turn]


def _columns(width, held_out_end, train):
    """First column of a part, and the one after its last."""
    held_out = width // 3
    if held_out_end == "left":
        return (held_out, width) if train else (0, held_out)
    return (0, width - held_out) if train else (width - held_out, width)


def _places(first, last, step):
    """Whole numbers from first to last, evenly spread and about `step` apart."""
    count = round((last - first) / step)
    return [first + round((last - first) * i / count) for i in range(count + 1)] if count else [(first + last) // 2]


def _path(name):
    package = importlib.util.find_spec("skimage")
    path = os.path.join(package.submodule_search_locations[0], "data", name) if package else ""
    if not os.path.isfile(path):
        raise UserError(f"data.name='photos' needs {name} of scikit-image; install it (pip install scikit-image) "
                        "or use another data set")
    return path


@functools.cache
def _photo(name, channels):
    with Image.open(_path(name)) as photo:
        return to_mode(photo, channels)
