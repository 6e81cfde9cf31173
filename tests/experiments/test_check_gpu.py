"""experiments/check_gpu.py, with its parts replaced: the page, the exit code and mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import only_line, run_script

CHECK = ["experiments/check_gpu.py", "--config", "configs/demo_config.py", "--config.run.device=cpu"]


@pytest.fixture
def commands(monkeypatch):
    """The commands of the parts, which then run nothing; the benchmark fails."""
    found, really = [], subprocess.run

    def run(command, **options):
        if command[0] != sys.executable:
            return really(command, **options)
        found.append(command[1:])
        if command[1].startswith("train_"):
            name, folder = (next(one.split("=")[1] for one in command if one.startswith(f"--config.run.{field}="))
                            for field in ("experiment", "output_dir"))
            path = Path(folder) / name
            path.mkdir(parents=True)
            (path / "metrics.jsonl").write_text(json.dumps({"step": 50, "loss": 0.25}) + "\n", encoding="utf-8")
        output = "step 1\rstep 2\r\nlast line ²\n".encode()
        return subprocess.CompletedProcess(command, int("benchmark" in command[1]), output)

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_a_part_that_fails_stops_no_other(commands, tmp_path):
    result = run_script(*CHECK, "--config.train.batch_size", 2, "--steps=60", "--output", tmp_path / "out")
    page = (tmp_path / "out/page.md").read_text(encoding="utf-8")
    assert result.code == 1 and "3 of 4 parts are ok" in result.out
    assert "Training step: failed" in page and "Reconstructions: ok" in page and "| 50 | 0.2500 |" in page
    assert "step 2\nlast line ²" in page and "step 1" not in page
    benchmark = next(command for command in commands if "benchmark" in command[0])
    assert benchmark[1:5] == ["--config", "configs/demo_config.py", "--config.run.device=cpu",
                              "--config.train.batch_size"] and benchmark[5] == "2"
    assert "--config.train.max_steps=60" in commands[2]


@pytest.mark.parametrize(("more", "line"), [
    (["--steps=3"], "steps"), (["--config.train.batch_size=0"], "config.train.batch_size=0 must be at least 1"),
    (["--output=/proc/page"], "--output=/proc/page")])
def test_mistakes_are_one_line_before_any_part(commands, more, line):
    assert line in only_line(run_script(*CHECK, *more)) and not commands
