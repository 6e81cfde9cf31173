import numpy as np
import pytest

from experiments.metrics.fid import cached_statistics, statistics


@pytest.fixture
def count_calls():
    """A compute() that knows how often it was called."""
    def compute():
        compute.calls += 1
        return statistics(np.random.default_rng(0).normal(size=(12, 5)))

    compute.calls = 0
    return compute


def check_equal(found, expected):
    assert found.count == expected.count
    for name in ("mean", "covariance", "features"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype


def test_a_hit_is_what_was_computed(tmp_path, count_calls):
    made = cached_statistics(tmp_path / "statistics", "faces", {"data": "abc"}, count_calls)
    found = cached_statistics(tmp_path / "statistics", "faces", {"data": "abc"}, count_calls)
    assert count_calls.calls == 1
    check_equal(found, made)
    files = list((tmp_path / "statistics").iterdir())
    assert len(files) == 1 and files[0].name.startswith("faces_") and files[0].suffix == ".npz"


@pytest.mark.parametrize("other", [{"data": "abd"}, {"data": "abc", "size": 64}, "abc"])
def test_another_key_is_computed_anew(tmp_path, count_calls, other):
    cached_statistics(tmp_path, "faces", {"data": "abc"}, count_calls)
    cached_statistics(tmp_path, "faces", other, count_calls)
    assert count_calls.calls == 2


def test_a_file_that_belongs_to_another_key_is_replaced(tmp_path, count_calls):
    cached_statistics(tmp_path, "faces", "first", count_calls)
    stale = next(tmp_path.iterdir()).read_bytes()
    cached_statistics(tmp_path, "faces", "second", count_calls)
    for path in tmp_path.iterdir():
        path.write_bytes(stale)
    cached_statistics(tmp_path, "faces", "second", count_calls)
    assert count_calls.calls == 3
    cached_statistics(tmp_path, "faces", "second", count_calls)
    assert count_calls.calls == 3


def cut(content, made):
    return content[:len(content) // 2]


def flip_a_bit(content, made):
    middle = content.index(made.features.tobytes()) + made.features.nbytes // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda *_: b"", lambda *_: b"no archive"])
def test_a_damaged_file_is_replaced(tmp_path, count_calls, damage):
    made = cached_statistics(tmp_path, "faces", "key", count_calls)
    path = next(tmp_path.iterdir())
    path.write_bytes(damage(path.read_bytes(), made))
    check_equal(cached_statistics(tmp_path, "faces", "key", count_calls), made)
    assert count_calls.calls == 2
    cached_statistics(tmp_path, "faces", "key", count_calls)
    assert count_calls.calls == 2 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", [{"covariance": np.zeros((4, 4))}, {"features": np.zeros((3, 4))}, {"mean": None},
                                    {"mean": np.array([None] * 5)}])
def test_a_file_with_other_arrays_is_replaced(tmp_path, count_calls, change):
    made = cached_statistics(tmp_path, "faces", "key", count_calls)
    content = {**made._asdict(), "key": repr("key"), **change}
    np.savez(next(tmp_path.iterdir()), **{name: value for name, value in content.items() if value is not None})
    check_equal(cached_statistics(tmp_path, "faces", "key", count_calls), made)
    assert count_calls.calls == 2


def test_an_interrupted_write_leaves_the_old_file(tmp_path, count_calls, monkeypatch):
    def interrupted(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_statistics(tmp_path, "faces", "key", count_calls)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_only_a_warning(tmp_path, count_calls, caplog):
    (tmp_path / "file").write_text("")
    made = cached_statistics(tmp_path / "file" / "statistics", "faces", "key", count_calls)
    check_equal(made, count_calls())
    assert "could not be kept" in caplog.text
