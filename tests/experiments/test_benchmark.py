import json

import pytest
import torch

from experiments.lib import benchmark_suites
from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, write_config_file

SCRIPT = "experiments/benchmark.py"


def test_every_suite_gives_a_table_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_suites, "OPERATOR", {"batch": 1, "size": (16, 16), "channels": 4, "kernel": 3})
    monkeypatch.setattr(benchmark_suites, "KNN", [((16, 16), 8)])
    for name in ("copy_bandwidth", "matmul_peak"):
        monkeypatch.setattr(benchmark_suites, name, lambda *_: 1e9)
    config = write_config_file(tiny_config(tmp_path), tmp_path / "ae.py")
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
    assert result.out.count("\n| --- |") == 5


def test_an_unknown_suite_is_refused(tmp_path):
    config = write_config_file(tiny_config(tmp_path), tmp_path / "ae.py")
    assert "--suites=all is unknown; choose from operator" in only_line(
        run_script(SCRIPT, "--config", config, "--suites", "all"))


def test_a_bad_config_is_told_before_the_first_suite(tmp_path):
    config = write_config_file(tiny_config(tmp_path), tmp_path / "ae.py")
    result = run_script(SCRIPT, "--config", config, "--config.model.attention=flash")
    assert "model.attention='flash' is not one of" in only_line(result)
    assert result.out == ""


def test_the_passes_that_are_timed_do_not_add_up_gradients(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    config.model.uno_dropout = 0.0
    steps, compared = [], []

    def calls(arms, *_):
        for name in ("forward and backward", "sparse layers of it"):
            gradients = []
            for _ in range(2):
                arms[name]()
                gradients.append([p.grad.clone() for p in steps[-1].parameters if p.grad is not None])
            compared.extend(zip(*gradients, strict=True))
        return dict.fromkeys(arms, 1.0)

    monkeypatch.setattr(benchmark_suites, "Step", lambda *arguments, make=benchmark_suites.Step: (
        steps.append(make(*arguments)) or steps[-1]))
    monkeypatch.setattr(benchmark_suites, "interleaved", calls)
    benchmark_suites.parts(config, torch.device("cpu"), 1)
    assert any(one.any() for one, _ in compared)
    for one, other in compared:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_the_losses_of_twenty_steps_follow_those_of_the_reference(tmp_path, precision, tolerance):
    config = tiny_config(tmp_path)
    config.model.backend, config.model.uno_dropout, config.train.precision = "auto", 0.0, precision
    fast, slow = (benchmark_suites.Step(config, torch.device("cpu"), reference) for reference in (False, True))
    losses = [(fast(), slow()) for _ in range(20)]
    assert losses[-1][0] != losses[0][0]
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=tolerance)
    for ours, theirs in zip(fast.average, slow.average, strict=True):
        assert (ours - theirs).abs().max() < 3e-4  # Adam's first steps are of one size whatever the gradient
