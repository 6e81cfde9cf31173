import os
import signal

import pytest
import torch

from data import latents
from data.latents import load_latents
from data.loader import oriented, to_float
from tests.data.numbers import Numbers
from utils.shutdown import REQUEUE, Stopped


class Encoder:
    """images -> latents; at its call number `last` it does something else as well."""

    def __init__(self, last=0, then=None):
        self.calls, self.last, self.then = 0, last, then

    def __call__(self, images):
        self.calls += 1
        if self.calls == self.last:
            self.then()
        return images[:, :, 0, 0] ** 2


def load(folder, encode, batch_size=2, turns=(0,)):
    return load_latents(folder / "latents.pt", "key", encode, Numbers(7, turns), Numbers(3, turns), batch_size, "cpu")


def fail():
    raise KeyboardInterrupt


@pytest.fixture
def expected(tmp_path):
    """Of a run of 12 batches that nobody disturbs."""
    (tmp_path / "whole").mkdir()
    encode = Encoder()
    found = load(tmp_path / "whole", encode)
    assert encode.calls == 12 and found.train.shape == (14, 3) and found.heldout.shape == (6, 3)
    return found


def check_is_whole(folder, found, expected):
    assert torch.equal(found.train, expected.train) and torch.equal(found.heldout, expected.heldout)
    assert [path.name for path in folder.glob("latents*")] == ["latents.pt"]
    encode = Encoder()
    assert torch.equal(load(folder, encode).train, expected.train) and not encode.calls


def test_all_orientations_are_encoded(tmp_path):
    found = load(tmp_path, Encoder(), turns=(0, 1, 2, 3))
    latents = found.train * found.std + found.mean
    expected = [oriented(to_float(Numbers(7)[i]), one)[:, 0, 0] ** 2 for one in Numbers(7, (0, 1, 2, 3)).orientations
                for i in range(7)]
    torch.testing.assert_close(latents, torch.stack(expected))
    assert found.heldout.shape == (24, 3)


@pytest.mark.parametrize("last", [1, 6, 12])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, expected, last):
    with pytest.raises(Stopped, match="stopped by SIGTERM while encoding") as stopped:
        load(tmp_path, Encoder(last, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert stopped.value.code == REQUEUE
    encode = Encoder()
    check_is_whole(tmp_path, load(tmp_path, encode), expected)
    assert encode.calls == 12 - last


def test_a_signal_while_the_cache_is_written_is_not_lost(tmp_path, expected, monkeypatch):
    save = latents.save_checkpoint
    monkeypatch.setattr(latents, "save_checkpoint", lambda *a: (os.kill(os.getpid(), signal.SIGUSR1), save(*a)))
    with pytest.raises(Stopped, match="stopped by SIGUSR1"):
        load(tmp_path, Encoder())
    check_is_whole(tmp_path, load(tmp_path, Encoder()), expected)


def test_a_killed_run_goes_on_from_what_it_had_saved(tmp_path, expected, monkeypatch):
    monkeypatch.setattr(latents, "SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, Encoder(9, fail))
    encode = Encoder()
    check_is_whole(tmp_path, load(tmp_path, encode), expected)
    assert encode.calls == 12 - 8


def test_parts_of_other_batches_or_damaged_ones_are_not_used(tmp_path, expected, monkeypatch):
    monkeypatch.setattr(latents, "SAVE_SECONDS", 0)
    for batch_size, damage in ((3, False), (2, True)):
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path, Encoder(3, fail), batch_size)
        part, = tmp_path.glob("latents.*_of_*.pt")
        if damage:
            part.write_bytes(part.read_bytes()[:300])
        encode = Encoder()
        load(tmp_path, encode)
        assert encode.calls == 12
        (tmp_path / "latents.pt").unlink()
