"""CelebA-HQ: `<root>/<size>/` for one or more sizes, or a flat folder; held out is what split.json says, or 5 %."""

import json
import os

from data.datasets.folder import Folder
from utils.errors import UserError


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
