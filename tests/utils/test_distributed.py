"""Several processes: what they tell each other, and how they end when one of them fails."""

import pytest
import torch

from tests.processes import torchrun
from tests.scripts import only_line, run_script
from utils import distributed

WORKER = "tests/utils/distributed_worker.py"


def test_one_process_needs_nobody():
    values = torch.arange(3.0)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.any_rank(True) is True and distributed.any_rank(0) is False
    assert distributed.gather(values) is values and distributed.from_main(lambda: 5) == 5
    assert list(distributed.share(4)) == [0, 1, 2, 3]
    assert torch.equal(distributed.concatenate([values[None], values[None]]), torch.stack([values, values]))


def test_collectives(tmp_path):
    result = torchrun(WORKER, "collectives", tmp_path)
    assert result.code == 0, result.err
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert (first["rank"], second["rank"], first["world"], second["world"]) == (0, 1, 2, 2)
    assert (first["main"], second["main"]) == (True, False)
    assert (first["share"], second["share"]) == ([0, 1], [2, 3, 4])
    for results in (first, second):
        assert results["any"] == [False, True, True]
        assert results["from_main"] == ["made by", 0]
        assert results["gather"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
        assert results["concatenate"].tolist() == [[value] * 3 for value in (0, 0, 10, 1, 1, 11, 11)]
        assert torch.equal(results["of one alone"], torch.ones(2, 3))


@pytest.mark.parametrize("case, line", [
    ("fails", "error: data.root_dir='x' is wrong (process 1 of 2)"),
    ("hangs", "error: waited 0.025 minutes for the other processes; one of them hangs, or the network between them is "
              "broken (process 0 of 2)"),
])
def test_a_process_that_fails_stops_all_with_its_line_alone(tmp_path, case, line):
    result = torchrun(WORKER, case, tmp_path)
    own, report = result.err.split("Sending process", 1)
    assert result.code == 1 and own.splitlines()[:-1] == [line], result.err  # the last one begins torchrun's report
    assert line in report  # which repeats it at the end


def test_a_process_that_is_killed_stops_all(tmp_path):
    result = torchrun(WORKER, "is_killed", tmp_path)
    own, report = result.err.split("Sending process", 1)
    assert result.code == 1 and "SIGKILL" in report
    assert all(line.startswith("error: lost the connection to another process; it was killed")
               for line in own.splitlines()[:-1])  # none where torchrun was faster


def test_a_bug_shows_one_traceback(tmp_path):
    result = torchrun(WORKER, "has_a_bug", tmp_path)
    own, report = result.err.split("Sending process", 1)
    assert result.code == 1 and own.count("Traceback") == 1 and "KeyError: 'no such thing'" in own
    assert "KeyError('no such thing')" in report


def test_a_script_for_one_process_says_so(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert "works in one process" in only_line(run_script("experiments/report.py"))
