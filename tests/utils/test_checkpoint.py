"""Checkpoints: what is saved comes back; a killed or failed writer leaves the old file; nothing in a file is run."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from utils.checkpoint import check_same_architecture, load_checkpoint, load_weights, save_checkpoint
from utils.errors import UserError


def test_round_trip(tmp_path):
    state = {"kind": "autoencoder", "step": 3, "modules": {"a": torch.arange(4.0)}, "list": [1, None, "x"]}
    save_checkpoint(tmp_path / "c.pt", state)
    loaded = load_checkpoint(tmp_path / "c.pt", "autoencoder")
    assert torch.equal(loaded["modules"]["a"], state["modules"]["a"])
    assert loaded["list"] == state["list"] and loaded["step"] == 3
    assert os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
def test_broken_file_is_one_line(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable checkpoint") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"kind": "latent", "w": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError):
        load_checkpoint(path)


def test_missing_other_kind_and_other_format(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")
    save_checkpoint(tmp_path / "c.pt", {"kind": "latent"})
    with pytest.raises(UserError, match="holds a latent, not a autoencoder"):
        load_checkpoint(tmp_path / "c.pt", "autoencoder")
    torch.save({"format": 99}, tmp_path / "d.pt")
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(tmp_path / "d.pt")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, write in (("a.pt", pickle.dump), ("b.pt", torch.save)):
        with open(name, "wb") as file:
            write(Malicious(), file)
        with pytest.raises(UserError):
            load_checkpoint(name)
    assert not os.path.exists("PWNED")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "c.pt"
    code = textwrap.dedent(f"""
        import torch
        from utils.checkpoint import save_checkpoint
        step = 0
        while True:
            step += 1
            save_checkpoint({str(path)!r}, {{"step": step, "w": torch.full((200_000,), float(step))}})
            print(step, flush=True)
    """)
    for lines in (1, 3):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        for _ in range(lines):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        loaded = load_checkpoint(path)
        assert (loaded["w"] == loaded["step"]).all() and loaded["step"] >= lines


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
