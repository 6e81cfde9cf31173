"""Any folder of images, read recursively; the last 5 % by sorted relative path are held out."""

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
