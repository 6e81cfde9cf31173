"""Writing files so that they appear whole or not at all."""

import contextlib
import json
import os
from pathlib import Path

from utils.errors import UserError


@contextlib.contextmanager
def replacing(path):
    """Yield a path beside `path` to write to; on success it takes the place of `path`, otherwise it is removed.

    A process killed at any moment leaves either the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder, field):
    """UserError, naming the config's field, where files could not be made in a folder, which need not be there yet."""
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "cannot be written" if nearest.is_dir() else "is not a folder"
        raise UserError(f"{field}: {str(nearest)!r} {reason}; choose another folder")


def check_output_file(path, flag):
    """UserError where a script could not write the file at the path that the flag gives; None is no mistake."""
    if path is None:
        return
    if Path(path).is_dir():
        raise UserError(f"--{flag}={path} is a folder; give the name of a file")
    check_writable(Path(path).parent, f"--{flag}={path}")


def read_json(path):
    """A dict from a JSON file; {} where there is none."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sync_folder(path):
    """Have the names in a folder on the disk, as os.fsync has the contents of a file."""
    if os.name == "nt":  # folders cannot be flushed there
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder):
    """Remove what processes that were killed while they wrote with `replacing` left in a folder."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)
