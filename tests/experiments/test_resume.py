"""A run that is killed or stopped by a signal, and restarted, produces bit-identical weights, metrics and images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.data.layouts import write_folder
from tests.scripts import ROOT
from tests.tiny import tiny_config, tiny_latent_config, write_config_file
from utils.checkpoint import load_checkpoint
from utils.logging import read_metrics

pytestmark = pytest.mark.slow

STEPS = 9


def run_jobs(folder, jobs):
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = subprocess.run([sys.executable, "-m", "tests.killed_runs", folder / "jobs.json"], cwd=ROOT, text=True,
                            capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of all runs, {run: results of its jobs})."""
    folder = tmp_path_factory.mktemp("runs")
    for name, count in (("a", 11), ("b", 12)):  # 21 are trained on, in batches of 4: no step up to STEPS ends an epoch
        write_folder(folder / "data" / name, count)
    config, latent = tiny_config(folder, folder / "data", "folder"), tiny_latent_config(folder)
    config.model.stochastic_encoding, config.diffusion.schedule_sampler = True, "loss-second-moment"
    config.data.condition = "class"
    config.diffusion.steps, config.train.accumulation_steps = 4, 2  # so few steps that the sampler's history fills
    for one in (config, latent):
        one.train.max_steps, one.train.checkpoint_steps, one.train.validate_steps = STEPS, 3, 2
        one.train.plot_samples_steps = 4
    files = write_config_file(config, folder / "ae.py"), write_config_file(latent, folder / "latent.py")
    stage_1 = ["train_inf_ae_diffusion.py", "--config", files[0]]
    stage_2 = ["train_latent_diffusion.py", "--config", files[1], "--decoder_config", files[0],
               "--decoder_config.run.experiment=whole_1"]
    jobs = []

    def job(name, command, **more):
        jobs.append({"command": [*command, f"--config.run.experiment={name}"], "record": str(folder / f"{name}.draws"),
                     **more})

    for stage, command in (("1", stage_1), ("2", stage_2)):
        job(f"whole_{stage}", command)
        for kill_at in (2, 5, None):
            job(f"killed_{stage}", command, kill_at=kill_at)
    for name, signals in (("term", ["SIGTERM"]), ("usr1", ["SIGUSR1", "SIGTERM"]), ("int", ["SIGINT"]),
                          ("twice", ["SIGTERM", "SIGINT"])):
        workers = 2 if name == "usr1" else 0
        job(name, [*stage_1, f"--config.data.num_workers={workers}"], signals={4: signals})
    job("term", stage_1)
    job("twice", stage_1)
    results = {}
    for one, result in zip(jobs, run_jobs(folder, jobs), strict=True):
        results.setdefault(Path(one["record"]).stem, []).append(result)
    return folder, results


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def draws(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.draws").read_text().splitlines()]


def metrics(folder, name):
    return [{key: value for key, value in line.items() if key not in ("seconds", "peak_memory_gb")}
            for line in read_metrics(folder / name / "metrics.jsonl")]


def check_same(folder, whole, other, prefix=""):
    """Compare every entry of every checkpoint, every line of the metrics and every image of two runs."""
    for name in (f"{prefix}checkpoint.pt", f"best_{prefix}checkpoint.pt"):
        states = [load_checkpoint(folder / run / name) for run in (whole, other)]
        for state in states:
            del state["config"]["run"]["experiment"]
        assert states[0].keys() == states[1].keys()
        for key in states[0].keys() - {"seconds"}:
            assert equal(states[0][key], states[1][key]), (name, key)
    lines = metrics(folder, whole)
    assert lines == metrics(folder, other)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "raw_validation_loss" in line] == [2, 4, 6, 8, 9]
    pictures = [{path.name: path.read_bytes() for path in (folder / run / "images").iterdir()}
                for run in (whole, other)]
    assert pictures[0] == pictures[1] and len(pictures[0]) >= 3
    # the draws of a step depend on the step alone, and no step is missing
    expected = {line["step"]: line for line in draws(folder, whole)}
    made = draws(folder, other)
    assert {line["step"] for line in made} == set(expected) == set(range(STEPS))
    assert all(line == expected[line["step"]] and line["draws"] >= 3 for line in made)
    return [line["step"] for line in made]


@pytest.mark.parametrize("stage, prefix", [("1", ""), ("2", "latent_")])
def test_a_killed_run_equals_an_uninterrupted_one(runs, stage, prefix):
    folder, results = runs
    assert [result["code"] for result in results[f"killed_{stage}"]] == [-9, -9, 0]
    steps = check_same(folder, f"whole_{stage}", f"killed_{stage}", prefix)
    # killed at step 2, before the first checkpoint, and at step 5, after the checkpoint of step 3
    assert steps == [0, 1, 0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("name, code", [("term", 75), ("usr1", 75), ("int", 130)])
def test_a_signal_stops_the_run_after_the_step_and_a_checkpoint(runs, name, code):
    folder, results = runs
    stopped = results[name][0]
    assert stopped["code"] == code
    assert "\nstopped by SIG" in stopped["err"] and "after step 5, saved in" in stopped["err"]
    assert "Traceback" not in stopped["err"]
    if name == "term":  # and it went on
        assert results[name][1]["code"] == 0
        assert check_same(folder, "whole_1", name) == list(range(STEPS))  # no step twice
    else:
        assert load_checkpoint(folder / name / "checkpoint.pt")["step"] == 5


def test_ctrl_c_after_a_signal_ends_the_run_without_a_checkpoint(runs):
    folder, results = runs
    assert [result["code"] for result in results["twice"]] == [130, 0]
    assert check_same(folder, "whole_1", "twice") == [0, 1, 2, 3, 3, *range(4, STEPS)]
