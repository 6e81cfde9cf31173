"""The LMDB that data/prepare.py writes: both parts of a data set at one size, as PNG."""

import io
import json
import os

from data.datasets.base import ImageDataset
from data.lmdb_reader import LmdbReader
from utils.errors import UserError

FORMAT = 1
RECORD = b"prepared"  # key of the record that describes the others, see `new_record`


def new_record(name, size, channels, train, held_out):
    """What a prepared LMDB says about itself, before any image is written.

    train, held_out   (number of images, fingerprint) of the source's two parts. `seen` counts the images tried,
                      `stored` those that could be read: the next key is `image_key(part, stored)`.
    """
    parts = {part: {"total": total, "source": source, "seen": 0, "stored": 0}
             for part, (total, source) in {"train": train, "held_out": held_out}.items()}
    return {"format": FORMAT, "name": name, "size": list(size), "channels": channels, "complete": False, "parts": parts}


def image_key(part, index):
    """Key of image `index` of "train" or "held_out"."""
    return f"{part}/{index:09d}".encode()


def is_lmdb(root):
    """Whether the folder is itself an LMDB (LSUN's lie one folder deeper)."""
    return os.path.isfile(os.path.join(root, "data.mdb"))


class Prepared(ImageDataset):
    """One part of a prepared LMDB, at its size or smaller.

    Raises UserError where it is unfinished or damaged, or holds another data set, fewer pixels or other channels.
    """

    def __init__(self, root, train, size, channels, name):
        super().__init__(root, train, size, channels)
        self.name = name
        self._reader = LmdbReader(root)
        record = self._read_record()
        if record["name"] != name:
            raise UserError(f"data.name={name!r}, but data.root_dir='{root}' was prepared from {record['name']!r}; "
                            "change one of them")
        if record["channels"] != channels:
            raise UserError(f"data.channels={channels}, but data.root_dir='{root}' was prepared with "
                            f"{record['channels']}; change it or prepare the data again")
        height, width = record["size"]
        if size[0] > height or size[1] > width:
            raise UserError(f"data.img_size={size[0]}x{size[1]} is more than the {height}x{width} that data.root_dir="
                            f"'{root}' was prepared with; lower it or prepare the data again")
        part = "train" if train else "held_out"
        self._part = record["parts"][part]
        self.keys = [image_key(part, index) for index in range(self._part["stored"])]

    def _read_record(self):
        value = self._reader.get(RECORD)
        if value is None:
            raise UserError(f"data.root_dir='{self.root}' is an LMDB that data/prepare.py did not write or finish; "
                            "run prepare again (for LSUN, give the folder above church_outdoor_train_lmdb)")
        try:
            record = json.loads(value)
        except ValueError:
            record = {}
        if not {"format", "complete", "parts"} <= set(record):
            raise UserError(f"data.root_dir='{self.root}' has a damaged record; prepare the data again")
        if record["format"] != FORMAT:
            raise UserError(f"data.root_dir='{self.root}' has format {record['format']}, this version reads {FORMAT}; "
                            "prepare the data again")
        if not record["complete"]:
            raise UserError(f"data.root_dir='{self.root}' is unfinished, run prepare again (the same command goes on)")
        return record

    def _open(self, key):
        return io.BytesIO(self._reader.get(key))

    def _version(self):
        return sorted(self._part.items())
