"""What every data set is: a list of images of one size, some of which may turn out to be unreadable."""

import hashlib
import os
import warnings

from PIL import Image

from data.images import UNREADABLE, load_image
from utils.errors import UserError


class ImageDataset:
    """Images as uint8 tensors [C, H, W], without augmentation.

    root       data.root_dir, the folder the images come from
    train      the training images; otherwise the held-out ones
    size       (H, W) of the images returned
    channels   1 or 3

    A subclass has a `name`, sets `keys`, one per image, and defines `_open(key)` and `_version()`.

    An image that cannot be read is replaced by the next one that can: a training run of days must survive a bad file.
    Reading stops with UserError once more than one image and more than 1 % of the set were unreadable. Every worker
    process counts for itself.
    """

    name = None  # in the registry
    flips = True  # mirror images are as good as the images: training shows both
    in_memory = False  # items are kept after they were read once, so worker processes would only do it again

    def __init__(self, root, train, size, channels):
        self.root, self.train, self.size, self.channels = root, train, tuple(size), channels
        self.keys = []
        self._unreadable = set()

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        """Image `index` as uint8 [C, H, W], or the next readable one."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        for offset in range(len(self)):
            item = (index + offset) % len(self)
            try:
                return self.read(item)
            except UserError:
                raise
            except UNREADABLE as error:
                self._note_unreadable(item, error)
        raise UserError(f"data.root_dir='{self.root}': no image of {self.name} could be read; check the files")

    def read(self, index):
        """Image `index` as uint8 [C, H, W]; raises one of data.images.UNREADABLE where it cannot be read."""
        return load_image(self._open(self.keys[index]), self.size, self.channels)

    def exact(self, index):
        """Image `index` for a model: as it is, or float32 [C, H, W] in [−1, 1] where 8 bits would be a loss."""
        return self[index]

    def source_size(self, index):
        """(H, W) of image `index` as it is stored, before it is cropped and resized."""
        with Image.open(self._open(self.keys[index])) as image:
            return image.height, image.width

    def describe(self):
        """One line for logs."""
        part = "training" if self.train else "held-out"
        height, width = self.size
        return f"{self.name}: {len(self)} {part} images of {height}x{width}, {self.channels} channels, {self.root}"

    def fingerprint(self):
        """Key, 32 hex digits, that changes when the images do: for caches of what is computed from them."""
        digest = hashlib.blake2b(digest_size=16)
        facts = (self.name, os.path.abspath(self.root), self.train, self.size, self.channels, len(self))
        for fact in (*facts, *self._version()):
            digest.update(repr(fact).encode() + b"\n")
        return digest.hexdigest()

    def _open(self, key):
        """Path or binary file object of one image."""
        raise NotImplementedError

    def _version(self):
        """Facts that change when the content does."""
        raise NotImplementedError

    def _note_unreadable(self, index, error):
        if not self._unreadable:
            warnings.warn(f"{self.name}: {self.label(index)} cannot be read ({error}); the next image takes its "
                          "place, here and wherever that happens again", stacklevel=3)
        self._unreadable.add(index)
        if too_many_unreadable(len(self._unreadable), len(self)):
            raise UserError(f"data.root_dir='{self.root}': {len(self._unreadable)} of {len(self)} images cannot be "
                            f"read, {self.label(index)} for one; that is more than 1 %, so mend or remove such files")

    def label(self, index):
        """What to call image `index` in a message."""
        key = self.keys[index]
        return key.decode(errors="replace") if isinstance(key, bytes) else str(key)


def too_many_unreadable(count, total):
    """More than one image, and more than 1 % of them."""
    return count > max(1, total / 100)


def split_tail(keys, train):
    """All but the last 5 % (at least one) for training; those otherwise."""
    held_out = max(1, len(keys) // 20)
    return keys[:-held_out] if train else keys[-held_out:]
