"""The base class of data sets, and what several of them share."""

import copy
import hashlib
import itertools
import os
import warnings
from pathlib import Path

from data.conditions import FILE, Conditions, class_indices, read_vectors
from data.images import UNREADABLE, WHITE, load_image, read_header
from utils.errors import UserError

FEW = 190  # training images of a folder of 200


class ImageDataset:
    """A list of images of one size, uint8 [C, H, W], without augmentation.

    root       data.root_dir, the folder of the images
    train      True for the training images, False for the held-out ones
    size       (H, W) of the images returned
    channels   1 or 3

    A subclass has a `name`, sets `keys`, one per image, and defines `_open(key)`. One whose images have classes defines
    `_classes()`.

    An unreadable image is replaced by the next readable one, because one bad file should not end a training run of
    days. UserError is raised once more than one image and more than 1 % of the set were unreadable. Every worker
    process counts for itself.
    """

    name = None  # in the registry
    flips = True  # training also shows mirror images
    turns = (0,)  # quarter turns that training shows, counter-clockwise
    sampled = 256  # images whose contents enter a fingerprint
    reading = {}  # arguments of data.images.read_image, set by build_dataset
    in_memory = False  # items are cached on first use, so worker processes would only repeat the work
    conditions = None  # data.conditions.Conditions, set by add_conditions
    condition_values = None  # of all images, int64 [N] or float32 [N, D]

    def __init__(self, root, train, size, channels):
        self.root, self.train, self.size, self.channels = root, train, tuple(size), channels
        self.keys = []
        self._fingerprint = None
        self._unreadable = set()

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        """Image `index` as uint8 [C, H, W], or the next readable one."""
        return self._readable(index)[1]

    def _readable(self, index):
        """(item, image): image `index`, or the next readable one."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        for offset in range(len(self)):
            item = (index + offset) % len(self)
            try:
                return item, self.read(item)
            except UserError:
                raise
            except UNREADABLE as error:
                self._note_unreadable(item, error)
        part = "training" if self.train else "held-out"
        raise UserError(f"data.root_dir='{self.root}': none of the {part} images ({len(self)} of {self.name}) can be "
                        f"read, for example {self.label(index)}; check the files")

    def read(self, index):
        """Image `index` as uint8 [C, H, W]; raises one of data.images.UNREADABLE if it cannot be read."""
        return load_image(self._open(self.keys[index]), self.size, self.channels, **self.reading)

    def with_condition(self, index):
        """(image, condition) as the model sees them: the image `index` as uint8 or, if 8 bits would lose precision,
        float32 in [−1, 1]; the condition int64 [] or float32 [D], or None if the data set has none."""
        item, image = self._readable(index)
        return image, self.condition(item)

    def condition(self, index):
        """Condition of image `index`; None if the data set has none."""
        return None if self.conditions is None else self.condition_values[index]

    def add_conditions(self, kind, source):
        """Give every image its condition, data.condition; source: data.condition_source. UserError if one has none."""
        if kind == "class":
            found, names = self._classes()
            self.conditions = Conditions("class", len(names), names)
            self.condition_values = class_indices(found, names, f"data.root_dir='{self.root}'")
        else:
            path = source or os.path.join(self.root, FILE)
            self.condition_values = read_vectors(path, [self.label(index) for index in range(len(self))])
            self.conditions = Conditions.of_vectors(self.condition_values)

    def _classes(self):
        """(class of each image of this part, sorted classes of the training images), by name."""
        raise UserError(f"data.condition='class', but the images of data.name={self.name!r} have no classes; use none "
                        "or vector")

    def of_class(self, place):
        """The images of one class, given by its index, as a data set."""
        part = copy.copy(self)
        own = [index for index, value in enumerate(self.condition_values.tolist()) if value == place]
        part.keys, part.condition_values = [self.keys[index] for index in own], self.condition_values[own]
        part._fingerprint, part._unreadable = None, set()
        return part

    def source_size(self, index):
        """(H, W) of image `index` in its file, before cropping and resizing."""
        return read_header(self._open(self.keys[index]))[0]

    @property
    def orientations(self):
        """[(quarter turns, True if mirrored)] that training shows; those of odd turns only if the images are square."""
        turns = self.turns if self.size[0] == self.size[1] else [turn for turn in self.turns if turn % 2 == 0]
        return [(turn, mirrored) for mirrored in ([False, True] if self.flips else [False]) for turn in turns]

    def describe(self):
        """One line: how many images, of what, from where."""
        part = "training" if self.train else "held-out"
        height, width = self.size
        return f"{self.name}: {len(self)} {part} images of {height}x{width}, {self.channels} channels, {self.root}"

    def notes(self):
        """Lines about too few images, and, from the headers of at most `sampled`, about those that are altered."""
        if self.train and len(self) < FEW:
            yield f"only {len(self)} images to train on: with fewer than 200 in all, expect copies of them, or blur"
        looked, small, transparent = spread(len(self), self.sampled), 0, 0
        for index in looked:
            try:
                (height, width), has_transparency = read_header(self._open(self.keys[index]))
            except UNREADABLE:
                continue
            small += height < self.size[0] or width < self.size[1]
            transparent += has_transparency
        if small:
            yield f"{small} of {len(looked)} examined images are smaller than {self.size[0]}x{self.size[1]}: enlarged"
        if transparent:
            yield (f"{transparent} of {len(looked)} examined images have an alpha channel: composited on "
                   f"{self.reading.get('background', WHITE)} (data.background)")

    def fingerprint(self):
        """32 hex digits that identify the images: the same files elsewhere have the same fingerprint.

        It is a digest of the names of all files relative to the root, of their sizes, and of the contents of at most
        `sampled` files, evenly spaced: reading all would take minutes. Dates do not enter it.
        """
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            for fact in (self.name, self.train, self.size, self.channels, self.reading, self.keys, *self._version()):
                digest.update(repr(fact).encode() + b"\n")
            if self.conditions:
                digest.update(repr(self.conditions).encode() + self.condition_values.numpy().tobytes())
            for index in spread(len(self), self.sampled):
                digest.update(hashlib.blake2b(self._content(index)).digest())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def label(self, index):
        """Name of image `index` in messages."""
        key = self.keys[index]
        return key.decode(errors="replace") if isinstance(key, bytes) else str(key)

    def _open(self, key):
        """Path or binary file object of one image."""
        raise NotImplementedError

    def _version(self):
        """Facts about all images, such as sizes, that are quick to read and change when the images do."""
        return ()

    def _content(self, index):
        """The bytes of image `index`; none if they cannot be read."""
        source = self._open(self.keys[index])
        try:
            return Path(source).read_bytes() if isinstance(source, (str, os.PathLike)) else source.read()
        except OSError:
            return b""

    def _note_unreadable(self, index, error):
        if not self._unreadable:
            warnings.warn(f"{self.name}: {self.label(index)} cannot be read ({error}); the next readable image "
                          "replaces it, and likewise for any others", stacklevel=3)
        self._unreadable.add(index)
        if too_many_unreadable(len(self._unreadable), len(self)):
            part = "training" if self.train else "held-out"
            raise UserError(f"data.root_dir='{self.root}': {len(self._unreadable)} of {len(self)} {part} images cannot "
                            f"be read, for example {self.label(index)} ({error}); at most 1 % may be unreadable, so "
                            "repair or remove such files")


def spread(count, most):
    """At most `most` of the indices 0 to count − 1, evenly spaced."""
    return [i * count // min(count, most) for i in range(min(count, most))]


def too_many_unreadable(count, total):
    """More than one image, and more than 1 % of them."""
    return count > max(1, total / 100)


def split_tail(keys, train):
    """All but the last 5 % (at least one) for training, the last 5 % otherwise."""
    held_out = max(1, len(keys) // 20)
    return keys[:-held_out] if train else keys[-held_out:]


def split_classes(keys, class_of, train):
    """split_tail of the keys of each class, taking the classes in turn."""
    keys = sorted(keys, key=class_of)
    parts = [split_tail(list(own), train) for _, own in itertools.groupby(keys, class_of)]
    return [key for turn in itertools.zip_longest(*parts) for key in turn if key is not None]
