"""Any folder of images, read recursively; the last 5 % by sorted relative path are held out.

FFHQ: 70,000 PNG files, flat or in folders of a thousand (00000/00000.png); the last 5 % are held out.

CelebA-HQ: `<root>/<size>/` for one or more sizes, or a flat folder; held out is what split.json says, or 5 %.
"""

import json
import os

from data.datasets.base import ImageDataset, split_tail
from utils.errors import UserError


class Folder(ImageDataset):
    """Images below `root`, of whatever sizes. Raises UserError where there are none.

    The parts that differ between data sets made of files (where they lie, what they are called, which are held out)
    are what the subclasses state.
    """

    name = "folder"
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
    example = "00000.png"

    def __init__(self, root, train, size, channels):
        super().__init__(root, train, size, channels)
        if not os.path.isdir(root):
            raise UserError(f"data.root_dir='{root}' is not a folder; set it to the folder of the images "
                            "(see README, Datasets)")
        self.folder = self._image_folder()
        self.keys = self._split(self._list_images())
        if not self.keys:
            raise UserError(f"data.root_dir='{root}' has one image; at least 2 are needed, as one is held out")

    def _image_folder(self):
        return self.root

    def _split(self, paths):
        return split_tail(paths, self.train)

    def _list_images(self):
        """Sorted paths relative to the folder; hidden files and folders are passed over."""
        found = []
        for folder, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.relpath(os.path.join(folder, name), self.folder) for name in files
                      if name.lower().endswith(self.suffixes) and not name.startswith(".")]
        if not found:
            raise UserError(f"data.root_dir='{self.folder}' has no images; expected files like {self.example} "
                            "(see README, Datasets)")
        return sorted(found)

    def _open(self, key):
        return os.path.join(self.folder, key)

    def _version(self):
        for key in self.keys:
            status = os.stat(os.path.join(self.folder, key))
            yield key, status.st_size, status.st_mtime_ns


class FFHQ(Folder):
    """Faces below `root`. Only PNG files count, so that pictures of another kind beside them do no harm."""

    name = "ffhq"
    suffixes = (".png",)
    example = "00000/00000.png"


class CelebA(Folder):
    """Faces of the smallest folder `<root>/<size>/` that holds the wanted size; the root itself if there are none.

    A file split.json in the root, {"train": [file names], "val": [file names]}, states the split.
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
            raise UserError(f"{file} names {missing[0]!r}, which is not in '{self.folder}' ({len(missing)} such names);"
                            " mend the file or remove it")
        return sorted(by_name[name] for name in (train if self.train else held_out))


def _read_split(file):
    wanted = f'{file} must be {{"train": [file names], "val": [file names]}}, with no name in both and none empty'
    try:
        with open(file, encoding="utf-8") as stream:
            split = json.load(stream)
        train, held_out = set(split["train"]), set(split["val"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{wanted}; mend the file or remove it ({type(error).__name__}: {error})") from error
    if not train or not held_out or train & held_out or not all(isinstance(n, str) for n in train | held_out):
        raise UserError(f"{wanted}; mend the file or remove it")
    return train, held_out
