"""LMDB folders: reading them from any number of processes, and LSUN's outdoor churches as distributed.

LSUN's folders are church_outdoor_train_lmdb and church_outdoor_val_lmdb; data/datasets/prepared.py has those of
data/prepare.py.
"""

import io
import os

import lmdb

from data.datasets.base import ImageDataset
from utils.errors import UserError

_environments = {}  # path -> environment, open in this process


class LmdbReader:
    """The records of the LMDB folder `path`, opened lazily, once per process. Raises UserError if it is damaged."""

    def __init__(self, path):
        self.path = os.path.abspath(path)
        close(path)  # the file may have been replaced since it was opened

    def get(self, key):
        """Value of a key, or None."""
        return self._read(lambda transaction: transaction.get(key))

    def keys(self):
        """All keys, in order. Values are not read."""
        return self._read(lambda transaction: list(transaction.cursor().iternext(keys=True, values=False)))

    def _read(self, query):
        try:
            if self.path not in _environments:
                _environments[self.path] = _open(self.path)
            with _environments[self.path].begin() as transaction:
                return query(transaction)
        except lmdb.Error as error:
            raise UserError(f"'{self.path}' is not an intact LMDB ({error}); copy or prepare it again") from error


def is_lmdb(folder):
    """True if the folder itself is an LMDB (LSUN's LMDBs lie one level deeper)."""
    return os.path.isfile(os.path.join(folder, "data.mdb"))


def close(path):
    """Close the LMDB folder if this process has it open; a reader opens it again on demand."""
    if os.path.abspath(path) in _environments:
        _environments.pop(os.path.abspath(path)).close()


def _open(path):
    environment = lmdb.open(path, readonly=True, create=False, lock=False, readahead=False, meminit=False)
    size = os.path.getsize(os.path.join(path, "data.mdb"))
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < expected:  # reading past the end would kill the process
        environment.close()
        raise lmdb.CorruptedError(f"data.mdb has {size:,} of {expected:,} bytes")
    return environment


def _close_all():
    for path in list(_environments):
        close(path)


# A forked worker can neither use its parent's environment nor open a second one beside it, so none may be open then.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_close_all)


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
