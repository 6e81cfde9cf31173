"""LSUN's outdoor churches, as distributed: the folders church_outdoor_train_lmdb and church_outdoor_val_lmdb."""

import io
import os

from data.datasets.base import ImageDataset
from data.datasets.lmdb import LmdbReader, is_lmdb
from utils.errors import UserError


class Churches(ImageDataset):
    """The centre of each image. LSUN's own validation set is held out."""

    name = "churches"

    def __init__(self, root, train, size, channels):
        super().__init__(root, train, size, channels)
        folder = f"church_outdoor_{'train' if train else 'val'}_lmdb"
        path = os.path.join(root, folder)
        if not is_lmdb(path):
            raise UserError(f"data.root_dir='{root}' has no {folder}/data.mdb; set it to the folder that holds LSUN's "
                            "unzipped church_outdoor_train_lmdb and church_outdoor_val_lmdb (see README, Datasets)")
        self._reader = LmdbReader(path)
        self.keys = self._reader.keys()
        if not self.keys:
            raise UserError(f"'{path}' is empty; unzip LSUN's {folder} again")

    def _open(self, key):
        return io.BytesIO(self._reader.get(key))
