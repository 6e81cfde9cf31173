"""Writing the LMDB of data/prepare.py, so that it can be killed at any time and goes on where it was."""

import functools
import io
import json
import os

import lmdb
from tqdm import tqdm

from data.datasets.base import too_many_unreadable
from data.datasets.prepared import RECORD, image_key, new_record
from data.images import UNREADABLE
from data.lmdb_reader import close
from data.workers import map_in_workers
from utils.errors import UserError
from utils.images import to_pil

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
