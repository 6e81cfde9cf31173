"""Preparing an LMDB: lossless, resumable after SIGKILL, refused until it is complete."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
import torch

from data.datasets import build_dataset, prepared
from data.datasets.prepared import write_prepared
from data.loader import all_batches
from tests.data.layouts import config, write_folder, write_lsun
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SIZE = 120  # of the script: a chunk exceeds the buffer of a worker's pipe, whose reader may be gone


def prepare(cfg, output, num_workers=0, size=None):
    return write_prepared(build_dataset(cfg, True, size), build_dataset(cfg, False, size), str(output), num_workers)


def items(cfg, train, size=None):
    return torch.stack(list(build_dataset(cfg, train, size)))


def at(cfg, root):
    cfg = cfg.copy_and_resolve_references()
    cfg.data.root_dir = str(root)
    return cfg


@pytest.fixture
def source(tmp_path):
    write_folder(tmp_path / "source", 50)
    return config("folder", tmp_path / "source")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "prepared"


@pytest.mark.parametrize("num_workers, channels", [(0, 1), (2, 3)])
def test_a_prepared_set_holds_the_same_pixels(source, output, num_workers, channels, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    source.data.channels = channels
    prepare(source, output, num_workers)
    for train in (True, False):
        dataset = build_dataset(at(source, output), train)
        assert torch.equal(torch.stack(list(dataset)), items(source, train))
        images = torch.cat([images for images, *_ in all_batches(dataset, 16, num_workers=2)])
        assert len(images) == len(dataset)


@pytest.mark.parametrize("name", ["photos", "churches"])
def test_any_data_set_can_be_prepared(name, tmp_path, output, monkeypatch):
    from data.datasets import photos
    monkeypatch.setattr(photos.Photos, "counts", (3, 4))
    write_lsun(tmp_path, "train", 5)
    write_lsun(tmp_path, "val", 2)
    cfg = config(name, tmp_path)
    prepare(cfg, output, size=(12, 16))
    for train in (True, False):
        assert torch.equal(items(at(cfg, output), train, (12, 16)), items(cfg, train, (12, 16)))


def test_a_prepared_set_can_be_smaller_but_not_larger(source, output):
    prepare(source, output)
    cfg = at(source, output)
    assert build_dataset(cfg, True, (8, 12))[0].shape == (3, 8, 12)
    for size in ((17, 8), (8, 17)):
        with pytest.raises(UserError, match=f"data.img_size={size[0]}x{size[1]} is more than the 16x16"):
            build_dataset(cfg, True, size)


def test_fingerprints_follow_the_source(source, output, tmp_path):
    prepare(source, output)
    key = build_dataset(at(source, output), True).fingerprint()
    assert key == build_dataset(at(source, output), True).fingerprint()
    assert key != build_dataset(at(source, output), False).fingerprint()
    prepare(source, output)  # again, though complete
    assert key == build_dataset(at(source, output), True).fingerprint()


class Killed(Exception):
    pass


def stop_after(monkeypatch, commits):
    original, left = prepared._commit, [commits]

    def commit(environment, records):
        if not left[0]:
            raise Killed
        left[0] -= 1
        original(environment, records)

    monkeypatch.setattr(prepared, "_commit", commit)


@pytest.mark.parametrize("commits", [1, 2, 7, 8])
def test_interrupted_between_any_two_commits_it_goes_on(source, output, monkeypatch, commits):
    monkeypatch.setattr(prepared, "CHUNK", 8)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, commits)
        prepare(source, output)
    with pytest.raises(UserError, match="unfinished, run prepare again"):
        build_dataset(at(source, output), True)
    encoded = []
    original = prepared._encode_image
    monkeypatch.setattr(prepared, "_encode_image", lambda *args: encoded.append(args) or original(*args))
    prepare(source, output)
    assert len(encoded) == 50 - min((commits - 1) * 8, 48 if commits < 8 else 50)
    for train in (True, False):
        assert torch.equal(items(at(source, output), train), items(source, train))


def test_interrupted_before_the_first_commit(source, output, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 0)
        prepare(source, output)
    with pytest.raises(UserError, match="prepare"):
        build_dataset(at(source, output), True)
    (output / "data.mdb").write_bytes(b"")  # killed while the file was being made
    prepare(source, output)
    assert torch.equal(items(at(source, output), False), items(source, False))


# The script, killed inside the transaction of its fifth commit (the first commits the record alone).
KILLED_IN_A_COMMIT = """
import os, runpy, signal
from data.datasets import prepared

def killing(items):
    yield from items
    os.kill(os.getpid(), signal.SIGKILL)

def commit(environment, items):
    commits.append(1)
    original(environment, killing(items) if len(commits) == 5 else items)

prepared.CHUNK = 8
commits, original, prepared._commit = [], prepared._commit, commit
runpy.run_path("data/prepare.py", run_name="__main__")
"""


@pytest.mark.slow
def test_killed_by_sigkill_the_same_command_goes_on(source, output, tmp_path):
    config_file = tmp_path / "tiny_config.py"
    config_file.write_text("from configs.defaults import autoencoder_config\n\n\n"
                           "def get_config():\n    return autoencoder_config(64)\n")

    def run(*program):  # returns when the workers, which hold the pipes too, have ended
        return subprocess.run([sys.executable, *program, f"--config={config_file}", "--config.data.name=folder",
                               f"--config.data.root_dir={source.data.root_dir}", f"--output={output}", "--workers=2",
                               f"--size={SIZE}"], capture_output=True, text=True, timeout=100, cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})

    first = run("-c", KILLED_IN_A_COMMIT)
    assert first.returncode == -signal.SIGKILL, first.stderr
    with pytest.raises(UserError, match="unfinished, run prepare again"):
        build_dataset(at(source, output), True)
    second = run("data/prepare.py")
    assert second.returncode == 0, second.stderr
    assert "48 training and 2 held-out images, 0 unreadable" in second.stdout
    assert "24/50" in second.stderr and "50/50" in second.stderr  # it went on after three chunks of 8
    for train in (True, False):
        assert torch.equal(items(at(source, output), train, SIZE), items(source, train, SIZE))


@pytest.mark.parametrize("change", ["size", "channels", "files"])
def test_other_data_are_not_mixed_into_a_prepared_set(source, output, change, tmp_path):
    prepare(source, output)
    if change == "channels":
        source.data.channels = 1
    if change == "files":
        write_folder(tmp_path / "source", 51)
    with pytest.raises(UserError, match="--output=.*other data"):
        prepare(source, output, size=8 if change == "size" else None)


def test_another_lmdb_is_not_written_to(source, tmp_path):
    write_lsun(tmp_path, "train", 2)
    with pytest.raises(UserError, match="another LMDB"):
        prepare(source, tmp_path / "church_outdoor_train_lmdb")


def test_a_full_disk_is_no_mistake_of_the_user(source, output, monkeypatch):
    def full(*_):
        raise lmdb.DiskError("No space left on device")

    monkeypatch.setattr(prepared, "_commit", full)
    with pytest.raises(OSError, match="--output=.* could not be written .*No space left"):
        prepare(source, output)


def test_the_map_grows(source, output, monkeypatch):
    monkeypatch.setattr(prepared, "MAP_SIZE", 2**16)
    prepare(source, output)
    assert (output / "data.mdb").stat().st_size > 2**16
    assert torch.equal(items(at(source, output), True), items(source, True))


def test_unreadable_images_are_left_out_and_counted(source, output, tmp_path):
    expected = items(source, True)
    (tmp_path / "source" / "00003.png").write_text("lost")
    record = prepare(source, output)
    assert (record["parts"]["train"]["seen"], record["parts"]["train"]["stored"]) == (48, 47)
    assert torch.equal(items(at(source, output), True), expected[[i for i in range(48) if i != 3]])


def test_too_many_unreadable_images_stop_it_again_and_again(source, output, tmp_path):
    for i in (3, 40):
        (tmp_path / "source" / f"{i:05d}.png").write_text("lost")
    for _ in range(2):
        with pytest.raises(UserError, match="2 of 50 images cannot be read"):
            prepare(source, output)
    with pytest.raises(UserError, match="unfinished"):
        build_dataset(at(source, output), True)
