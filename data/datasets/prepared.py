"""Prepared data sets: both parts of any data set in one LMDB, as PNGs of one size. data/prepare.py writes them.

A record in the LMDB, under the key RECORD, describes the images. Images and progress are committed in one transaction,
so the record is always true: writing can be killed at any time and continued.
"""

import functools
import io
import json
import os

import lmdb
import numpy as np
import torch
from tqdm import tqdm

from data.conditions import Conditions
from data.datasets.base import ImageDataset, too_many_unreadable
from data.datasets.lmdb import LmdbReader, close, is_lmdb
from data.images import UNREADABLE
from data.loader import map_in_workers
from utils.errors import UserError
from utils.files import check_writable
from utils.images import to_pil

FORMAT = 1
RECORD = b"prepared"
CHUNK = 32  # images per transaction
MAP_SIZE = 64 * 2**20  # bytes, doubled whenever they are full


class Prepared(ImageDataset):
    """One part of a prepared data set, at its size or smaller.

    name    data.name, which must be that of the source
    Raises UserError if it is unfinished or damaged, or holds another data set, fewer pixels or other channels.
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
        self._part, self._saved_conditions = record["parts"][part], record.get("conditions")
        self.keys = [_image_key(part, index) for index in range(self._part["stored"])]

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

    def add_conditions(self, kind, source):
        """Those that the images were prepared with. UserError if they are of another kind; `source` is not used."""
        found = self._saved_conditions[0] if self._saved_conditions else "none"
        if found != kind:
            raise UserError(f"data.condition={kind!r}, but data.root_dir='{self.root}' was prepared with {found!r}; "
                            "change it or prepare the data again")
        self.conditions = Conditions(*self._saved_conditions)
        dtype = np.int64 if kind == "class" else np.float32
        values = [np.frombuffer(self._reader.get(_condition_key(key)), dtype) for key in self.keys]
        values = torch.from_numpy(np.stack(values))
        self.condition_values = values[:, 0] if kind == "class" else values

    def _open(self, key):
        return io.BytesIO(self._reader.get(key))

    def _version(self):
        return sorted(self._part.items())


def write_prepared(train_set, held_out_set, output, num_workers):
    """Write both parts of a data set to the LMDB folder `output`, or whatever is missing there. Returns the record.

    Raises UserError if the folder holds anything else, or too many images are unreadable, and OSError if writing fails.
    """
    datasets = {"train": train_set, "held_out": held_out_set}
    try:
        _check_folder(output, train_set.root)
        with lmdb.open(os.fspath(output), map_size=MAP_SIZE) as environment:
            record = _begin_or_continue(environment, _new_record(datasets), output)
            parts = record["parts"]
            with tqdm(total=sum(part["total"] for part in parts.values()), unit="image", smoothing=0.05,
                      initial=sum(part["seen"] for part in parts.values())) as progress:
                for name, dataset in datasets.items():
                    for count in _write_part(environment, record, name, dataset, num_workers):
                        progress.update(count)
            for name, what in (("train", "training"), ("held_out", "held-out")):
                if not parts[name]["stored"]:
                    raise UserError(f"data.root_dir='{train_set.root}': none of the {parts[name]['total']} {what} "
                                    "images can be read; check the files")
            _commit(environment, [(RECORD, _encode_record(record | {"complete": True}))])
    except (lmdb.Error, OSError) as error:
        raise OSError(f"--output={output} could not be written ({error}); solve that and run the same command again"
                      ) from error
    return record


def _new_record(datasets):
    """The record before any image is written.

    Of the `total` images of a part, `seen` were tried and `stored` were readable; the next is _image_key(part, stored).
    """
    one = datasets["train"]
    parts = {part: {"total": len(dataset), "source": dataset.fingerprint(), "seen": 0, "stored": 0}
             for part, dataset in datasets.items()}
    record = {"format": FORMAT, "name": one.name, "size": list(one.size), "channels": one.channels, "complete": False,
              "parts": parts}
    return record if one.conditions is None else {**record, "conditions": list(one.conditions)}


def _image_key(part, index):
    return f"{part}/{index:09d}".encode()


def _condition_key(image_key):
    return image_key + b"/condition"


def _check_folder(output, source):
    if os.path.realpath(output) == os.path.realpath(source):
        raise UserError(f"--output='{output}' is data.root_dir itself; choose another folder")
    check_writable(output, f"--output={output}")
    if os.path.isdir(output) and os.listdir(output) and not is_lmdb(output):
        raise UserError(f"--output='{output}' has other files in it; choose a folder that does not exist yet")
    os.makedirs(output, exist_ok=True)
    close(output)


def _begin_or_continue(environment, wanted, output):
    """The record in the LMDB if it describes the same data; a new one in an empty LMDB."""
    with environment.begin() as transaction:
        found = transaction.get(RECORD)
    if found is None:
        if environment.stat()["entries"]:
            raise UserError(f"--output='{output}' is another LMDB; choose a folder that does not exist yet")
        _commit(environment, [(RECORD, _encode_record(wanted))])
        return wanted
    found = json.loads(found)
    if _without_progress(found) != _without_progress(wanted):
        raise UserError(f"--output='{output}' was begun with other data, size or channels, or the files have changed "
                        "since; remove it or choose another folder")
    return found


def _without_progress(record):
    sources = {name: (part["total"], part["source"]) for name, part in record["parts"].items()}
    return record["format"], record["name"], record["size"], record["channels"], sources


def _write_part(environment, record, name, dataset, num_workers):
    """Write what is missing of one part; yields the number of images done after each commit."""
    part = record["parts"][name]
    chunks = [range(first, min(first + CHUNK, len(dataset))) for first in range(part["seen"], len(dataset), CHUNK)]
    for images in map_in_workers(functools.partial(_encode_images, dataset), chunks, min(num_workers, len(chunks))):
        items = []
        for image in images:
            if image is not None:
                key = _image_key(name, part["stored"])
                items.append((key, image))
                if dataset.conditions:
                    items.append((_condition_key(key), dataset.condition(part["seen"]).numpy().tobytes()))
                part["stored"] += 1
            part["seen"] += 1
        _check_unreadable(record, dataset)
        _commit(environment, [*items, (RECORD, _encode_record(record))])
        yield len(images)


def _encode_images(dataset, indices):
    """PNG bytes of each image, or None if it is unreadable."""
    return [_encode_image(dataset, index) for index in indices]


def _encode_image(dataset, index):
    try:
        image = dataset.read(index)
    except UserError:
        raise
    except UNREADABLE as error:
        tqdm.write(f"skipped {dataset.label(index)}: {error}")
        return None
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _check_unreadable(record, dataset):
    parts = record["parts"].values()
    total, unreadable = sum(part["total"] for part in parts), sum(part["seen"] - part["stored"] for part in parts)
    if too_many_unreadable(unreadable, total):
        raise UserError(f"data.root_dir='{dataset.root}': {unreadable} of {total} images cannot be read (see above), "
                        "more than 1 %; repair or remove those files, remove --output and run again")


def _commit(environment, items):
    """Put all (key, value) in one transaction; the map grows if it is full."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def _encode_record(record):
    return json.dumps(record).encode()
