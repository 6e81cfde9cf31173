"""Statistics of real images on disk, so that a data set of 70,000 images is put through a network once."""

import hashlib
import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np

from utils import distributed
from utils.files import replacing
from utils.metrics import Statistics

UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


def cached_statistics(folder, label, key, compute):
    """The Statistics stored for `key` in `folder`, or those of compute(), which are then stored.

    label  start of the file's name, for people
    key    printable; everything the statistics depend on. Another key is another file; a file that is damaged or
           belongs to another key is written anew.
    Of several processes the main one reads and writes; all call compute(), and it is the main one's result that counts.
    """
    path = Path(folder) / f"{label}_{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.npz"
    found = _read(path, repr(key)) if distributed.is_main() else None
    if distributed.any_rank(found is not None):
        logging.info("statistics of the real images from %s", path)
        return found
    made = compute()
    if not distributed.is_main():
        return made
    try:
        _write(path, repr(key), made)
    except OSError as error:  # the score is still good
        logging.warning("statistics of the real images could not be kept in %s: %s", path, error)
    return made


def _read(path, key):
    try:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["key"]) != key:
                return None
            found = Statistics(archive["mean"], archive["covariance"], int(archive["count"]), archive["features"])
    except UNREADABLE:
        return None
    width = len(found.mean)
    if found.covariance.shape != (width, width) or found.features.shape[1:] != (width,):
        return None
    return found


def _write(path, key, statistics):
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, key=key, **statistics._asdict())
