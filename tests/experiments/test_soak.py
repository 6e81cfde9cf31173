"""How the soak test compares two runs; the soak itself takes minutes and is not part of the suite."""

import json
import runpy
import shutil

import pytest
from absl import flags

from tests.scripts import ROOT
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.logging import read_metrics


@pytest.fixture
def first_difference():
    known = set(flags.FLAGS)
    yield runpy.run_path(str(ROOT / "experiments" / "soak.py"))["first_difference"]
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)


def another_line(run, **changes):
    path = run / "metrics.jsonl"
    lines = read_metrics(path)
    path.write_text("".join(json.dumps(line) + "\n" for line in [{**lines[0], **changes}, *lines[1:]]))


def another_picture(run):
    first, second, *_ = sorted((run / "images").iterdir())
    shutil.copy(first, second)


def another_state(run, name, **changes):
    save_checkpoint(run / name, load_checkpoint(run / name) | changes)


@pytest.mark.parametrize("change, found", [
    (lambda run: another_line(run, seconds=1e9, peak_memory_gb=1e9), None),  # the only things that may differ
    (lambda run: another_state(run, "checkpoint.pt", seconds=1e9), None),
    (lambda run: another_line(run, loss=1e9), "metrics.jsonl"),
    (lambda run: another_line(run, more=1), "metrics.jsonl"),
    (another_picture, "images"),
    (lambda run: another_state(run, "checkpoint.pt", step=3), "checkpoint.pt, step"),
    (lambda run: another_state(run, "best_checkpoint.pt", value=0.0), "best_checkpoint.pt, value"),
])
def test_runs_are_equal_but_for_what_a_machine_measures(trained, tmp_path, first_difference, change, found):
    for name in ("whole", "other"):
        shutil.copytree(trained[0] / "checkpoints" / "tiny", tmp_path / name / "run")
    change(tmp_path / "other" / "run")
    assert first_difference(tmp_path / "whole", tmp_path / "other") == found
