"""Windows of the photographs that scikit-image ships: a data set that needs no download.

The left or right third of every photograph is kept for held-out windows; no training window holds a pixel of it.
"""

import functools
import importlib.util
import os

from PIL import Image

from data.datasets.base import ImageDataset
from data.images import fit, to_mode, to_tensor
from utils.errors import UserError
from utils.rng import seed_of

# Colour photographs of objects, each with its held-out end. motorcycle_right.png is missing because it repeats
# motorcycle_left.png; hubble_deep_field.jpg and ihc.png because they are textures without layout.
PHOTOS = (
    ("astronaut.png", "left"),
    ("chelsea.png", "right"),
    ("coffee.png", "right"),
    ("motorcycle_left.png", "left"),
    ("retina.jpg", "right"),
    ("rocket.jpg", "left"),
)
SIDES = (64, 72, 80, 90, 102, 114, 128)  # of windows, in pixels of the photograph
LARGEST = SIDES[-1]  # the largest img_size, because windows are never enlarged
STEP = 0.15  # between windows, as a share of their side
TRAIN_WINDOWS, HELD_OUT_WINDOWS = 1000, 64  # per photograph


class Photos(ImageDataset):
    """Square windows of the photographs, in a mixed order. `root` is not used.

    Only windows with at least `size` pixels per side are used. Items are cached, 120 MB at most. Raises UserError for a
    size above LARGEST.
    """

    name = "photos"
    sampled = 32
    in_memory = True

    def __init__(self, root, train, size, channels):
        super().__init__("scikit-image", train, size, channels)
        if max(size) > LARGEST:
            raise UserError(f"data.img_size={size[0]}x{size[1]} is more than the {LARGEST}x{LARGEST} pixels of the "
                            f"largest windows of 'photos'; use at most {LARGEST}, or another data set")
        self.keys = windows(train, max(size))
        self._items = {}

    def read(self, index):
        """Window `index` as uint8 [C, H, W]."""
        if index not in self._items:
            name, left, top, side = self.keys[index]
            window = _photo(name, self.channels).crop((left, top, left + side, top + side))
            self._items[index] = to_tensor(fit(window, self.size))
        return self._items[index].clone()

    def source_size(self, index):
        """(H, W) of window `index` in pixels of its photograph."""
        return (self.keys[index][3],) * 2

    def notes(self):
        """Nothing: windows are never enlarged."""
        return ()

    def label(self, index):
        """Name of image `index` in messages."""
        return "window {1},{2} (side {3}) of {0}".format(*self.keys[index])

    def _content(self, index):
        return self.read(index).numpy().tobytes()


def windows(train, smallest=0):
    """Windows of a part, (file name, left, top, side) in pixels of the photograph, taking the photographs in turn.

    smallest   least side
    """
    sides = [side for side in SIDES if side >= smallest]
    found = []
    for name, held_out_end in PHOTOS:
        with Image.open(_path(name)) as photo:
            width, height = photo.size
        start, stop = _columns(width, held_out_end, train)
        of_photo = {(name, left, top, side) for side in sides for left in _places(start, stop - side, STEP * side)
                    for top in _places(0, height - side, STEP * side)}
        mixed = sorted(of_photo, key=lambda window: seed_of("photos", *window))
        found.append(mixed[:TRAIN_WINDOWS if train else HELD_OUT_WINDOWS])
    return [window for turn in zip(*found, strict=False) for window in turn]  # few windows are very large


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
