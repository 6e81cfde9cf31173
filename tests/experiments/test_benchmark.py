"""benchmark.py: every suite runs, and the step that it measures is the reference's in less time."""

import json
import runpy
import types

import pytest
import torch
from absl import flags

from experiments.lib import benchmark_suites
from tests.scripts import ROOT, only_line, run_script
from tests.tiny import tiny_config, write_config_file

SCRIPT, CPU = "experiments/benchmark.py", torch.device("cpu")


@pytest.fixture
def stage_1():
    """The names of train_inf_ae_diffusion.py, without its flags."""
    known = set(flags.FLAGS)
    yield types.SimpleNamespace(**runpy.run_path(str(ROOT / "train_inf_ae_diffusion.py")))
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)


@pytest.mark.slow
def test_every_suite_gives_a_table_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_suites, "OPERATOR", {"batch": 1, "size": (16, 16), "channels": 4, "kernel": 3})
    monkeypatch.setattr(benchmark_suites, "KNN", [(2, (16, 16), 8)])
    for name in ("copy_bandwidth", "matmul_peak"):
        monkeypatch.setattr(benchmark_suites, name, lambda *_: 1e9)
    config = write_config_file(tiny_config(tmp_path / "runs"), tmp_path / "ae.py")
    output = tmp_path / "new" / "benchmark.json"
    result = run_script(SCRIPT, "--config", config, "--against", "reference", "--repeats", 1, "--sampling_steps", 2,
                        "--output", output)
    assert result.code == 0, result.err
    suites = json.loads(output.read_text())["suites"]
    assert list(suites) == ["operator", "knn", "training", "parts", "sampling"]
    assert {row["density"] for row in suites["operator"]} == {1, 1 / 2, 1 / 4, 1 / 8, 1 / 16}
    assert {row["path"] for row in suites["training"]} == {row["path"] for row in suites["sampling"]}
    for row in suites["training"]:
        assert row["ms"] > 0 and row["peak MB"] > 0 and row["dense GFLOP"] > 0
    assert result.out.count("\n| --- |") == 5 and not (tmp_path / "runs").exists()


def test_mistakes_are_told_before_the_first_suite(tmp_path):
    config = write_config_file(tiny_config(tmp_path), tmp_path / "ae.py")
    for flag, said in (("--suites=all", "--suites=all is unknown; choose from operator"),
                       ("--config.model.attention=flash", "model.attention='flash'")):
        result = run_script(SCRIPT, "--config", config, flag)
        assert said in only_line(result) and result.out == ""


def test_repeated_passes_do_not_accumulate_gradients(tmp_path, monkeypatch, stage_1):
    config, trainers, make = tiny_config(tmp_path), [], benchmark_suites.make_trainer
    config.model.uno_dropout = 0.0
    monkeypatch.setattr(benchmark_suites, "make_trainer", lambda *args: trainers.append(make(*args)) or trainers[-1])
    parts = benchmark_suites.parts_of_step(stage_1, config, CPU)
    for name in ("forward and backward", "sparse layers"):
        gradients = []
        for _ in range(2):
            parts[name]()
            gradients.append([p.grad.clone() for p in trainers[0].modules.parameters() if p.grad is not None])
        assert any(one.any() for one in gradients[0])
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("precision", "tolerance"), [
    ("fp32", 1e-3), pytest.param("bf16", 3e-2, marks=pytest.mark.slow)])
def test_five_steps_follow_those_of_the_reference(tmp_path, stage_1, precision, tolerance):
    config = tiny_config(tmp_path)
    config.model.backend, config.model.uno_dropout, config.train.precision = "auto", 0.0, precision
    fast, slow = (benchmark_suites.make_trainer(stage_1, config, CPU, reference) for reference in (False, True))
    batches = [benchmark_suites.random_batches(config, CPU) for _ in range(2)]
    losses = []
    for _ in range(5):
        fast.sums = {}
        fast.training_step(batches[0])
        losses.append(fast.sums["loss"].item())
        assert losses[-1] == pytest.approx(slow.training_step(batches[1]), rel=tolerance)
    assert len(set(losses)) == 5
    for ours, theirs in zip(fast.ema.modules.parameters(), slow.average, strict=True):
        assert (ours - theirs).abs().max() < 3e-4  # the first steps of Adam have one size whatever the gradient
