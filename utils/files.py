"""Files that appear whole or not at all, and checks of where they can be written."""

import contextlib
import errno
import json
import os
import platform
import tempfile
from pathlib import Path

from utils.errors import UserError

TEXT = "utf-8-sig"  # of text files that are read: UTF-8, also with the mark that editors on Windows put first

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` to write to; on success it replaces `path`, otherwise it is removed.

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
    """UserError, naming the config field or flag, unless files can be created in a folder, which need not exist yet."""
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise UserError(f"{field}: {str(nearest)!r} is not a folder; choose another folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"{field}: {str(nearest)!r} cannot be written ({error.strerror}); choose another folder"
                        ) from error


def check_output_file(path, flag):
    """UserError unless a file can be written at the path that --<flag> gives; None is allowed."""
    if path is None:
        return
    if Path(path).is_dir():
        raise UserError(f"--{flag}={path} is a folder; give the name of a file")
    check_writable(Path(path).parent, f"--{flag}={path}")


def read_json(path):
    """The dict in a JSON file; {} if the file is missing or holds something else."""
    try:
        found = json.loads(Path(path).read_text(encoding=TEXT))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path, data):
    """Write plain data as an indented JSON file, which appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def try_lock(path):
    """Lock a file, which is created if it is missing, and return it; None if another process has locked it.

    The lock lasts until the file is closed or this process ends. Child processes do not inherit it. It also works on
    network file systems; where a system or file system has no locks, every call succeeds.
    """
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # returned
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def sync_folder(path):
    """Flush the names in a folder to disk, as os.fsync does with the contents of a file, where the system can."""
    if os.name == "nt":  # Windows cannot flush folders
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot either
            raise
    finally:
        os.close(folder)


def remove_leftovers(folder):
    """Remove temporary files of `replacing` that killed processes left in a folder."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)
