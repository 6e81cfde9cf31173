"""Checkpoint files: what is saved comes back; a failed writer leaves the old file; nothing in a file is executed."""

import hashlib
import os
import platform
import random
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from tests.scripts import ROOT
from utils import checkpoint
from utils.checkpoint import (
    MARK,
    DamagedCheckpoint,
    check_same_architecture,
    identity,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from utils.device import environment
from utils.errors import UserError


def test_round_trip(tmp_path):
    state = {"kind": "autoencoder", "step": 3, "modules": {"a": torch.arange(4.0)}, "list": [1, None, "x"]}
    save_checkpoint(tmp_path / "c.pt", state)
    loaded = load_checkpoint(tmp_path / "c.pt", "autoencoder")
    assert torch.equal(loaded["modules"]["a"], state["modules"]["a"])
    assert loaded["list"] == state["list"] and loaded["step"] == 3
    assert os.listdir(tmp_path) == ["c.pt"]


def test_it_records_where_it_was_made(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"kind": "latent"})
    made = load_checkpoint(tmp_path / "c.pt")["environment"]
    assert made["python"] == platform.python_version() and torch.__version__.startswith(made["packages"]["torch"])
    assert f"{os.cpu_count()} cores" in made["machine"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    assert made["commit"].removesuffix("-dirty") == (head.stdout.strip() if head.returncode == 0 else "")
    assert torch.load(tmp_path / "c.pt", weights_only=True)["kind"] == "latent"  # others can read it as well


@pytest.mark.parametrize("git", ["", "exit 1", "echo fatal; exit 128", None])
def test_without_git_or_a_checkout_the_commit_is_empty(tmp_path, monkeypatch, git):
    monkeypatch.setenv("PATH", str(tmp_path))
    if git is not None:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{git}\n")
        (tmp_path / "git").chmod(0o755)
    environment.cache_clear()
    assert environment()["commit"] == ""
    environment.cache_clear()


def test_identity_follows_the_contents_and_not_the_place(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"step": 1})
    save_checkpoint(tmp_path / "b.pt", {"step": 2})
    (tmp_path / "a.safetensors").write_bytes(b"a")
    (tmp_path / "b.safetensors").write_bytes(b"b" * 200)
    found = set()
    for path in sorted(tmp_path.iterdir()):
        copy = tmp_path / "copy" / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
        os.utime(copy, (1, 1))
        assert identity(copy) == identity(path)
        found.add(identity(path))
    assert len(found) == 4


def seal(path):
    """Add the checksum of a checkpoint to a file, as anybody can."""
    content = path.read_bytes()
    path.write_bytes(content + MARK + hashlib.blake2b(content, digest_size=32).hexdigest().encode())


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
def test_a_broken_file_is_reported_in_one_line(tmp_path, content, sealed):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    if sealed:
        seal(path)
    with pytest.raises(DamagedCheckpoint, match="not a readable checkpoint") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_short_or_has_one_bit_changed_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"kind": "latent", "w": torch.randn(1000)})
    content = path.read_bytes()
    random.seed(0)
    for place in [0, len(content) - 1, *random.sample(range(len(content)), 60)]:
        path.write_bytes(content[:place])
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(path)
        changed = bytearray(content)
        changed[place] ^= 1 << random.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path)["kind"] == "latent"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="c.pt could not be written .No space left on device.; the files saved"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_file_is_flushed_before_it_gets_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    path, calls, fsync, replace = tmp_path / "c.pt", [], os.fsync, os.replace
    save_checkpoint(path, {"step": 1})

    def fsync_noted(file):
        calls.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else os.fstat(file).st_size)
        fsync(file)

    def replace_noted(source, target):
        calls.append((Path(source).parent, Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync_noted)
    monkeypatch.setattr(os, "replace", replace_noted)
    save_checkpoint(path, {"step": 2}, tmp_path / "c.1.pt")
    size = path.stat().st_size
    assert calls == [size, (tmp_path, tmp_path / "c.1.pt"), (tmp_path, path), "folder"]


@pytest.mark.parametrize("room", [0, 5_000, 300_000])
def test_a_disk_that_is_full_in_the_middle_of_a_file_is_named(tmp_path, monkeypatch, room):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})
    write, written = checkpoint._HashedFile.write, [0]

    def limited(file, data):
        written[0] += len(data)
        if written[0] > room:
            file.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        return write(file, data)

    monkeypatch.setattr(checkpoint._HashedFile, "write", limited)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(path, {"step": 2, "w": torch.randn(100_000), "v": torch.randn(100_000)})
    assert load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["c.pt"]


def test_a_folder_that_is_not_one_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="c.pt could not be written"):
        save_checkpoint(tmp_path / "run" / "c.pt", {"step": 1})


def test_weights_that_differ_are_named_with_both_shapes(tmp_path):
    module = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"weight is \(3, 5\) in the checkpoint and \(3, 2\) in the model"):
        load_weights(module, torch.nn.Linear(5, 3).state_dict(), "c.pt")
    with pytest.raises(UserError, match="bias is absent in the checkpoint"):
        load_weights(module, torch.nn.Linear(2, 3, bias=False).state_dict(), "c.pt")


def test_architecture_that_differs_names_field_and_both_values():
    saved = {"model": {"nf": 64, "uno_mults": [1, 2], "backend": "numba"}}
    check_same_architecture(saved, {"model": {"nf": 64, "uno_mults": (1, 2), "backend": "torch_dense"}}, "c.pt")
    with pytest.raises(UserError, match=r"model.nf=64, the config has 32"):
        check_same_architecture(saved, {"model": {"nf": 32}}, "c.pt")
