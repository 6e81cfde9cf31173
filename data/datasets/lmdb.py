"""Reading LMDB files from any number of processes.

LSUN churches: the LMDB folders church_outdoor_train_lmdb and church_outdoor_val_lmdb below the root.

The LMDB that data/prepare.py writes: both parts of a data set at one size, as PNG.

Writing the LMDB of data/prepare.py, so that it can be killed at any time and goes on where it was.
"""

import functools
import io
import json
import os

import lmdb
from tqdm import tqdm

from data.datasets.base import ImageDataset, too_many_unreadable
from data.images import UNREADABLE
from data.loader import map_in_workers
from utils.errors import UserError
from utils.images import to_pil

_environments = {}  # path -> environment, open in this process


def close(path):
    """Close the LMDB folder if this process has it open; a reader of it opens it again."""
    if os.path.abspath(path) in _environments:
        _environments.pop(os.path.abspath(path)).close()


def _close_all():
    for path in list(_environments):
        close(path)


# A forked worker can neither use its parent's environment nor open a second one beside it, so none may be open then.
if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(before=_close_all)


class LmdbReader:
    """The records of the LMDB folder `path`, opened lazily, once per process. Raises UserError where it is damaged."""

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
            raise UserError(f"'{self.path}' is not a sound LMDB ({error}); copy or prepare it again") from error


def _open(path):
    environment = lmdb.open(path, readonly=True, create=False, lock=False, readahead=False, meminit=False)
    size = os.path.getsize(os.path.join(path, "data.mdb"))
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < expected:  # reading past the end would kill the process
        environment.close()
        raise lmdb.CorruptedError(f"data.mdb has {size:,} of {expected:,} bytes")
    return environment


class Churches(ImageDataset):
    """Outdoor churches, the centre of each image. LSUN's own validation set is held out."""

    name = "churches"

    def __init__(self, root, train, size, channels):
        super().__init__(root, train, size, channels)
        folder = f"church_outdoor_{'train' if train else 'val'}_lmdb"
        path = os.path.join(root, folder)
        if not os.path.isfile(os.path.join(path, "data.mdb")):
            raise UserError(f"data.root_dir='{root}' has no {folder}/data.mdb; set it to the folder that holds LSUN's "
                            "unzipped church_outdoor_train_lmdb and church_outdoor_val_lmdb (see README, Datasets)")
        self._reader = LmdbReader(path)
        self.keys = self._reader.keys()
        if not self.keys:
            raise UserError(f"'{path}' is empty; unzip LSUN's {folder} again")

    def _open(self, key):
        return io.BytesIO(self._reader.get(key))

    def _version(self):
        status = os.stat(os.path.join(self._reader.path, "data.mdb"))
        return status.st_size, status.st_mtime_ns


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


CHUNK = 32  # images encoded and committed at a time
MAP_SIZE = 64 * 2**20  # bytes, doubled whenever they are full


def write_prepared(train_set, held_out_set, output, num_workers):
    """Write both parts of a data set, as their items are, to the LMDB folder `output`, or the rest of them.

    Images and progress are committed together, in order, so what the record says is always true. Returns the record.
    Raises UserError where the folder holds anything else, or too many images cannot be read.
    """
    datasets = {"train": train_set, "held_out": held_out_set}
    wanted = new_record(train_set.name, train_set.size, train_set.channels,
                        *((len(dataset), dataset.fingerprint()) for dataset in datasets.values()))
    try:
        _check_folder(output, train_set.root)
        with lmdb.open(os.fspath(output), map_size=MAP_SIZE) as environment:
            record = _begin_or_continue(environment, wanted, output)
            parts = record["parts"]
            with tqdm(total=sum(part["total"] for part in parts.values()), unit="image", smoothing=0.05,
                      initial=sum(part["seen"] for part in parts.values())) as progress:
                for name, dataset in datasets.items():
                    for count in _write_part(environment, record, name, dataset, num_workers):
                        progress.update(count)
            if not all(part["stored"] for part in parts.values()):
                raise UserError(f"data.root_dir='{train_set.root}': no readable image in one part; check the files")
            _commit(environment, [(RECORD, _encode_record(record | {"complete": True}))])
    except (lmdb.Error, OSError) as error:
        raise UserError(f"--output='{output}' cannot be written ({error}); see to it and run the same command again, "
                        "or choose another folder") from error
    return record


def _check_folder(output, source):
    if os.path.realpath(output) == os.path.realpath(source):
        raise UserError(f"--output='{output}' is data.root_dir itself; choose another folder")
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"--output='{output}' is a file; choose a folder that does not exist yet")
    if os.path.isdir(output) and os.listdir(output) and not os.path.exists(os.path.join(output, "data.mdb")):
        raise UserError(f"--output='{output}' has other files in it; choose a folder that does not exist yet")
    os.makedirs(output, exist_ok=True)
    close(output)


def _begin_or_continue(environment, wanted, output):
    """The record in the LMDB, if it is of the same data; a new one in an empty LMDB."""
    with environment.begin() as transaction:
        found = transaction.get(RECORD)
    if found is None:
        if environment.stat()["entries"]:
            raise UserError(f"--output='{output}' is another LMDB; choose a folder that does not exist yet")
        _commit(environment, [(RECORD, _encode_record(wanted))])
        return wanted
    found = json.loads(found)
    if _content(found) != _content(wanted):
        raise UserError(f"--output='{output}' was begun with other data, size or channels, or the files have changed "
                        "since; remove it or choose another folder")
    return found


def _content(record):
    """What a record says apart from the progress."""
    sources = {name: (part["total"], part["source"]) for name, part in record["parts"].items()}
    return record["format"], record["name"], record["size"], record["channels"], sources


def _write_part(environment, record, name, dataset, num_workers):
    """Write what is missing of one part; yields the number of images done after each commit."""
    part = record["parts"][name]
    chunks = [range(first, min(first + CHUNK, len(dataset))) for first in range(part["seen"], len(dataset), CHUNK)]
    for images in map_in_workers(functools.partial(_encode_images, dataset), chunks, min(num_workers, len(chunks))):
        items = []
        for image in images:
            part["seen"] += 1
            if image is not None:
                items.append((image_key(name, part["stored"]), image))
                part["stored"] += 1
        _check_unreadable(record, dataset)
        _commit(environment, [*items, (RECORD, _encode_record(record))])
        yield len(images)


def _encode_images(dataset, indices):
    """Each image as PNG, or None where it cannot be read."""
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
                        "more than 1 %; mend or remove those files, remove --output and run again")


def _commit(environment, items):
    """Put all (key, value) in one transaction, in a larger map if need be."""
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
