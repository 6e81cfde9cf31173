"""A file appears whole or not at all."""

import pytest

from utils.files import replacing


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
