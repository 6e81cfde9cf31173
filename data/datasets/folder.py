"""Data sets made of image files: any folder, FFHQ and CelebA-HQ."""

import json
import os
from collections import Counter

from data.datasets.base import ImageDataset, split_classes, split_tail
from data.images import SUFFIXES, in_words, list_images
from utils.errors import UserError
from utils.files import TEXT


class Folder(ImageDataset):
    """All images below `root`, of any sizes; the last 5 % by relative path are held out, with classes of each class.

    The class of an image is the folder that it lies in, relative to the root.

    Subclasses state what differs: the folder, the file names, the split. If the root holds the images at several sizes,
    the smallest folder of at least the size asked for is read. Raises UserError if there are no images.
    """

    name = "folder"
    suffixes = SUFFIXES
    example = "00000.png"

    def __init__(self, root, train, size, channels):
        super().__init__(root, train, size, channels)
        if not os.path.isdir(root):
            raise UserError(f"data.root_dir='{root}' is not a folder; set it to the folder of the images "
                            "(see README, Datasets)")
        self.folder = self._image_folder()
        paths, self._left_out = list_images(self.folder, self.suffixes)
        if not paths:
            left_out = f", and {in_words(self._left_out)} are left out" if self._left_out else ""
            raise UserError(f"data.root_dir='{self.folder}' has no images; expected files like {self.example} "
                            f"({' '.join(self.suffixes)}; see README, Datasets){left_out}")
        self._paths, self.keys = paths, self._split(paths, train)
        if not self.keys:
            raise UserError(f"data.root_dir='{root}' has one image; at least 2 are needed, one to train on and one "
                            "held out")

    def _image_folder(self):
        by_size = self._folders_by_size()
        if not by_size:
            return self.root
        large_enough = [size for size in by_size if size >= max(self.size)]
        if not large_enough:
            raise UserError(f"data.img_size={max(self.size)} is more than the {max(by_size)} that data.root_dir="
                            f"'{self.root}' holds; add a folder of larger images or lower data.img_size")
        return os.path.join(self.root, by_size[min(large_enough)])

    def _folders_by_size(self):
        """{size in pixels: name of the folder in the root that holds the images at that size}."""
        return {}

    def _split(self, paths, train, by_class=False):
        return split_classes(paths, os.path.dirname, train) if by_class else split_tail(paths, train)

    def add_conditions(self, kind, source):
        """As for all data sets; with classes, the images of each are split."""
        if kind == "class":
            self.keys = self._split(self._paths, self.train, by_class=True)
        super().add_conditions(kind, source)

    def _classes(self):
        counts = Counter(map(os.path.dirname, self._paths))
        for path, folders, _ in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if not folders and not counts[os.path.relpath(path, self.folder)] and path != self.folder:
                raise UserError(f"data.condition='class', but the folder {path} has no image; add some, or remove it")
        if counts[""]:
            raise UserError(f"data.condition='class', but {counts['']} images lie in '{self.folder}' itself; each "
                            "class needs a folder in it")
        train = self._split(self._paths, True, by_class=True)
        names = sorted(set(map(os.path.dirname, train)))
        for name in counts.keys() - set(names):
            raise UserError(f"data.condition='class', but no image of {name!r} is left to train on ({counts[name]} in "
                            "all); add some, or remove the folder")
        return list(map(os.path.dirname, self.keys)), names

    def notes(self):
        """Lines about images that are left out or altered."""
        if self._left_out:
            yield f"left out: {in_words(self._left_out)}"
        yield from super().notes()

    def _open(self, key):
        return os.path.join(self.folder, key)

    def _version(self):
        for key in self.keys:
            yield os.path.getsize(os.path.join(self.folder, key))


class FFHQ(Folder):
    """70,000 faces as PNG files, flat or in folders of a thousand (00000/00000.png). Other files are ignored.

    The root is the folder of the files, or the whole download, with images1024x1024 or thumbnails128x128 in it.
    """

    name = "ffhq"
    suffixes = (".png",)
    example = "00000/00000.png"

    def _folders_by_size(self):
        folders = {128: "thumbnails128x128", 1024: "images1024x1024"}
        return {size: name for size, name in folders.items() if os.path.isdir(os.path.join(self.root, name))}


class CelebA(Folder):
    """CelebA-HQ: faces in `<root>/<size>/`, for one or more sizes, or in the root itself.

    The split is that of `<root>/split.json`, {"train": [file names], "val": [file names]}, if there is one.
    """

    name = "celeba"

    def _folders_by_size(self):
        return {int(name): name for name in os.listdir(self.root)
                if name.isdecimal() and name[0] != "0" and os.path.isdir(os.path.join(self.root, name))}

    def _split(self, paths, train, by_class=False):
        file = os.path.join(self.root, "split.json")
        if not os.path.exists(file):
            return super()._split(paths, train, by_class)
        training, held_out = _read_split(file)
        by_name = {os.path.basename(path): path for path in paths}
        missing = sorted((training | held_out) - by_name.keys())
        if missing:
            raise UserError(f"{file} lists {missing[0]!r}, which is not in '{self.folder}' ({len(missing)} names are "
                            "missing); repair the file or remove it")
        return sorted(by_name[name] for name in (training if train else held_out))


def _read_split(file):
    wanted = f'{file} must be {{"train": [file names], "val": [file names]}}, with no name in both and neither empty'
    try:
        with open(file, encoding=TEXT) as stream:
            split = json.load(stream)
        train, held_out = set(split["train"]), set(split["val"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{wanted}; repair the file or remove it ({type(error).__name__}: {error})") from error
    if not train or not held_out or train & held_out or not all(isinstance(n, str) for n in train | held_out):
        raise UserError(f"{wanted}; repair the file or remove it")
    return train, held_out
