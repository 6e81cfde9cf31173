"""The checkpoints of a run: which are kept and loaded; a kill at any instant leaves one; a thread writes them."""

import logging
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from utils import checkpoint
from utils.checkpoint import CheckpointFolder, load_checkpoint, load_newest
from utils.errors import UserError

KIND = "autoencoder"


def state(step):
    return {"kind": KIND, "step": step, "weights": torch.full((1000,), float(step))}


def save(folder, *steps):
    for step in steps:
        folder.save(state(step))
        folder.wait()


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def names(path):
    return sorted(file.name for file in path.iterdir())


@pytest.mark.parametrize("keep, older", [(1, []), (2, [3]), (3, [3, 2]), (9, [3, 2, 1])])
def test_the_newest_and_those_before_it_are_kept(tmp_path, keep, older):
    folder = CheckpointFolder(tmp_path, "checkpoint.pt", keep)
    assert not folder.exists()
    save(folder, 1, 2, 3, 4)
    folder.save_best(state(2))
    folder.wait()
    assert names(tmp_path) == sorted(["best_checkpoint.pt", "checkpoint.pt", *(f"checkpoint.{s}.pt" for s in older)])
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
    assert all(load_checkpoint(tmp_path / f"checkpoint.{s}.pt")["step"] == s for s in older)
    again = CheckpointFolder(tmp_path, "checkpoint.pt", keep)  # another process goes on in the same way
    assert again.load(KIND)[0]["step"] == 4
    save(again, 4, 5)
    assert names(tmp_path)[1:] == sorted(["checkpoint.pt", *(f"checkpoint.{s}.pt" for s in [4, *older][:keep - 1])])


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-700]), flip,
                                    lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_damaged_newest_file_falls_back_to_the_one_before_with_one_warning(tmp_path, caplog, damage):
    save(CheckpointFolder(tmp_path, "checkpoint.pt", 3), 1, 2, 3)
    damage(tmp_path / "checkpoint.pt")
    folder = CheckpointFolder(tmp_path, "checkpoint.pt", 3)
    with caplog.at_level(logging.WARNING):
        loaded, path = folder.load(KIND)
    assert loaded["step"] == 2 and path == tmp_path / "checkpoint.2.pt"
    assert len(caplog.records) == 1 and "\n" not in caplog.text.strip()
    assert "checkpoint.pt is" in caplog.text and "checkpoint.2.pt of step 2" in caplog.text
    save(folder, 4)  # the damaged file is replaced, not kept in place of a good one
    assert names(tmp_path) == ["checkpoint.1.pt", "checkpoint.2.pt", "checkpoint.pt"]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4


def test_it_falls_back_as_far_as_needed_and_says_so_where_nothing_is_left(tmp_path):
    save(CheckpointFolder(tmp_path, "checkpoint.pt", 3), 10, 20, 30)
    flip(tmp_path / "checkpoint.pt")
    flip(tmp_path / "checkpoint.20.pt")
    folder = CheckpointFolder(tmp_path, "checkpoint.pt", 2)
    assert folder.load(KIND)[0]["step"] == 10
    flip(tmp_path / "checkpoint.10.pt")
    with pytest.raises(UserError, match=r"checkpoint.pt is not a readable checkpoint \(.*\), and neither can "
                       r"checkpoint.20.pt or checkpoint.10.pt be read; restore it"):
        load_newest(tmp_path / "checkpoint.pt", KIND)
    flip(tmp_path / "checkpoint.10.pt")
    # having gone back to step 10, it does not keep the damaged state of step 20 in place of a good one
    for step, kept in ((12, 10), (14, 12)):
        save(folder, step)
        assert names(tmp_path) == [f"checkpoint.{kept}.pt", "checkpoint.pt"]


def test_another_kind_is_a_mistake_not_damage(tmp_path):
    save(CheckpointFolder(tmp_path, "checkpoint.pt", 2), 1, 2)
    with pytest.raises(UserError, match="holds a autoencoder, not a latent"):
        load_newest(tmp_path / "checkpoint.pt", "latent")
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_newest(tmp_path / "other.pt", KIND)


@pytest.fixture
def slow(monkeypatch):
    """Writes that wait for slow.set()."""
    gate, original = threading.Event(), checkpoint.save_checkpoint

    def save_checkpoint(*arguments):
        assert gate.wait(60)
        original(*arguments)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_checkpoint)
    return gate


def test_saving_copies_and_returns_and_a_second_save_waits_for_the_first(tmp_path, slow):
    folder = CheckpointFolder(tmp_path, "checkpoint.pt", 2)
    weights = torch.ones(1000)
    folder.save({"kind": KIND, "step": 1, "nested": {"list": [weights, 1], "tuple": (weights,)}})
    weights.fill_(2.0)  # training goes on before anything is written
    folder.check()
    assert not (tmp_path / "checkpoint.pt").exists()
    threading.Timer(0.1, slow.set).start()
    folder.save(state(2))
    loaded = load_checkpoint(tmp_path / "checkpoint.pt")
    nested = loaded["nested"]
    assert loaded["step"] == 1 and (nested["list"][0] == 1).all() and (nested["tuple"][0] == 1).all()
    folder.wait()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("call", [lambda folder: folder.check(), lambda folder: folder.wait(),
                                  lambda folder: folder.save(state(3)), lambda folder: folder.save_best(state(3))])
def test_what_goes_wrong_while_writing_is_raised_by_the_next_call(tmp_path, monkeypatch, call):
    folder = CheckpointFolder(tmp_path, "checkpoint.pt", 2)
    save(folder, 1)
    monkeypatch.setattr(os, "fsync", full)
    folder.save(state(2))
    folder._writing.exception()  # has come about
    with pytest.raises(OSError, match="checkpoint.pt could not be written .No space left on device."):
        call(folder)
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint.pt"] and load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 1
    folder.check()  # once


def full(*_):
    raise OSError(28, "No space left on device")


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], text=True,
                          capture_output=True, timeout=100)


@pytest.mark.slow
def test_a_process_does_not_end_before_the_write_is_done(tmp_path):
    result = run("""
        import sys, time, torch
        from utils import checkpoint as checkpoint_folder
        write = checkpoint_folder.save_checkpoint
        checkpoint_folder.save_checkpoint = lambda *arguments: (time.sleep(0.3), write(*arguments))
        checkpoint_folder.CheckpointFolder(sys.argv[1], "checkpoint.pt", 2).save({"kind": "x", "step": 1})
    """, tmp_path)
    assert result.returncode == 0 and load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 1


KILL = """
    import os, sys, torch
    from pathlib import Path
    from utils import checkpoint
    from utils.checkpoint import CheckpointFolder, load_newest
    from utils.device import environment
    from utils.files import remove_leftovers

    folder, keep = Path(sys.argv[1]), int(sys.argv[2])
    environment()
    torch.set_num_threads(1)

    def state(step):
        return {"kind": "x", "step": step, "weights": torch.full((1000,), float(step))}

    def save_until_killed(first, steps, calls):
        '''Save `steps` states, from `first` on; be gone at call number `calls` of what touches the disk.'''
        left = [calls]

        def counted(function):
            def call(*arguments, **keywords):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return function(*arguments, **keywords)
            return call

        for name in ("open", "fsync", "replace", "unlink", "close"):
            setattr(os, name, counted(getattr(os, name)))
        write = checkpoint._HashedFile.write

        def write_half(file, data):
            left[0] -= 1
            if left[0] == 0:
                write(file, bytes(data)[:len(data) // 2])
                file.flush()
                os._exit(9)
            return write(file, data)

        checkpoint._HashedFile.write = write_half
        checkpoints = CheckpointFolder(folder, "checkpoint.pt", keep)
        if checkpoints.exists():
            checkpoints.load("x")
        for step in range(first, first + steps):
            checkpoints.save(state(step))
            checkpoints.wait()
            published.write(step.to_bytes(2, "little"))

    done, calls, leftovers = 0, 0, 0
    while True:
        calls += 1
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            published = os.fdopen(write, "wb", buffering=0)
            save_until_killed(done + 1, 3, calls)
            os._exit(0)
        os.close(write)
        said = os.fdopen(read, "rb").read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        known = max([done, *(int.from_bytes(said[i:i + 2], "little") for i in range(0, len(said), 2))])
        if known or (folder / "checkpoint.pt").exists():
            loaded, path = load_newest(folder / "checkpoint.pt", "x")
            assert (loaded["weights"] == loaded["step"]).all()
            assert known <= loaded["step"] <= known + 1, (calls, known, loaded["step"])
            done = loaded["step"]
        leftovers += len(list(folder.glob(".*.tmp")))
        remove_leftovers(folder)
        if code == 0:
            kept = {p.name for p in folder.iterdir()}
            assert kept == {"checkpoint.pt", *(f"checkpoint.{done - i}.pt" for i in range(1, keep))}, kept
            break
        assert code == 9
    print(calls, done, leftovers)
"""


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 3])
def test_a_writer_killed_at_every_stage_of_a_save_leaves_the_newest_state(tmp_path, keep):
    result = run(KILL, tmp_path, keep)
    assert result.returncode == 0, result.stderr
    calls, done, leftovers = map(int, result.stdout.split())
    assert calls > 30 and done > 10 and leftovers > 10  # it was killed often, at places that matter
