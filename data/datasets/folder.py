"""Data sets made of image files: any folder, FFHQ and CelebA-HQ."""

import json
import os

from data.datasets.base import ImageDataset, split_tail
from data.images import SUFFIXES, list_images
from utils.errors import UserError


class Folder(ImageDataset):
    """All images below `root`, of any sizes; the last 5 % by relative path are held out.

    Subclasses state what differs: the folder, the file names, the split. Raises UserError if there are no images.
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
        paths = list_images(self.folder, self.suffixes)
        if not paths:
            raise UserError(f"data.root_dir='{self.folder}' has no images; expected files like {self.example} "
                            "(see README, Datasets)")
        self.keys = self._split(paths)
        if not self.keys:
            raise UserError(f"data.root_dir='{root}' has one image; at least 2 are needed, one to train on and one "
                            "held out")

    def _image_folder(self):
        return self.root

    def _split(self, paths):
        return split_tail(paths, self.train)

    def _open(self, key):
        return os.path.join(self.folder, key)

    def _version(self):
        for key in self.keys:
            yield os.path.getsize(os.path.join(self.folder, key))


class FFHQ(Folder):
    """70,000 faces as PNG files, flat or in folders of a thousand (00000/00000.png). Other files are ignored."""

    name = "ffhq"
    suffixes = (".png",)
    example = "00000/00000.png"


class CelebA(Folder):
    """CelebA-HQ: faces in `<root>/<size>/`, for one or more sizes, or in the root itself.

    The smallest folder of at least the size asked for is read. The split is that of `<root>/split.json`,
    {"train": [file names], "val": [file names]}, if there is one.
    """

    name = "celeba"

    def _image_folder(self):
        sizes = sorted(int(name) for name in os.listdir(self.root)
                       if name.isdecimal() and name[0] != "0" and os.path.isdir(os.path.join(self.root, name)))
        if not sizes:
            return self.root
        large_enough = [size for size in sizes if size >= max(self.size)]
        if not large_enough:
            raise UserError(f"data.img_size={max(self.size)} is more than the {sizes[-1]} that data.root_dir="
                            f"'{self.root}' holds; add the folder {max(self.size)}/ or lower data.img_size")
        return os.path.join(self.root, str(large_enough[0]))

    def _split(self, paths):
        file = os.path.join(self.root, "split.json")
        if not os.path.exists(file):
            return super()._split(paths)
        train, held_out = _read_split(file)
        by_name = {os.path.basename(path): path for path in paths}
        missing = sorted((train | held_out) - by_name.keys())
        if missing:
            raise UserError(f"{file} lists {missing[0]!r}, which is not in '{self.folder}' ({len(missing)} names are "
                            "missing); repair the file or remove it")
        return sorted(by_name[name] for name in (train if self.train else held_out))


def _read_split(file):
    wanted = f'{file} must be {{"train": [file names], "val": [file names]}}, with no name in both and neither empty'
    try:
        with open(file, encoding="utf-8") as stream:
            split = json.load(stream)
        train, held_out = set(split["train"]), set(split["val"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{wanted}; repair the file or remove it ({type(error).__name__}: {error})") from error
    if not train or not held_out or train & held_out or not all(isinstance(n, str) for n in train | held_out):
        raise UserError(f"{wanted}; repair the file or remove it")
    return train, held_out
