"""A file appears whole or not at all."""

import errno
import os

import pytest

from utils.files import replacing, sync_folder


def test_success_replaces_and_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "below" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


def test_only_a_file_system_that_cannot_flush_folders_may_refuse_to(tmp_path, monkeypatch):
    def fail(number):
        def fsync(_):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(os, "fsync", fsync)

    fail(errno.EINVAL)
    sync_folder(tmp_path)
    fail(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_folder(tmp_path)
