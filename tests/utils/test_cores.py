"""The warning about cores that other programs use, from texts as Linux writes them."""

import logging
import os
import subprocess
import sys

import pytest

from utils import cores
from utils.cores import advice, allowed_cores, busy_cores

INFINITE = float("inf")


def stat(*ticks_of_cores):
    """A text of /proc/stat with (core, user, system, idle, iowait, steal) for each of the cores."""
    lines = ["cpu  9 9 9 9 9 9 9 9 0 0"]
    lines += [f"cpu{core} {user} 0 {system} {idle} {iowait} 0 0 {steal} {9 * user} 0"
              for core, user, system, idle, iowait, steal in ticks_of_cores]
    return "\n".join([*lines, "intr 3 4", ""])


def test_work_and_what_the_host_takes_are_busy_and_waiting_for_a_disk_is_not():
    before = stat((0, 50, 50, 100, 0, 0), (1, 0, 0, 0, 0, 0), (2, 0, 0, 0, 0, 0), (10, 0, 0, 0, 0, 0))
    after = stat((0, 55, 65, 120, 0, 0), (1, 0, 0, 10, 30, 0), (2, 0, 0, 10, 0, 30), (10, 40, 0, 0, 0, 0))
    assert busy_cores(before, after, {0}) == pytest.approx(0.5)
    assert busy_cores(before, after, {1}) == 0
    assert busy_cores(before, after, {2}) == pytest.approx(0.75)
    assert busy_cores(before, after, {0, 1, 2, 10}) == pytest.approx(2.25)


def test_cores_of_which_nothing_is_known_are_free():
    text = stat((0, 1, 2, 3, 4, 5))
    assert busy_cores(text, text, {0, 4, 5}) == 0  # no time has passed, and a container that numbers its own cores
    assert busy_cores("", "", {0}) == busy_cores(text, "", {0}) == 0


def test_a_core_is_busy_at_most_once():
    before, after = stat((0, 0, 0, 0, 30, 0)), stat((0, 5, 0, 15, 6, 0))  # Linux may take back time of waiting
    assert busy_cores(before, after, {0}) == pytest.approx(0.25)


@pytest.mark.parametrize("threads, cores_there, busy, allowed, fitting", [
    (2, 2, 1.0, INFINITE, 1), (2, 2, 0.6, INFINITE, 1), (2, 2, 2.0, INFINITE, 1), (8, 8, 3.2, INFINITE, 5),
    (64, 64, 6.5, INFINITE, 58), (8, 4, 1.0, INFINITE, 3),
    (64, 64, 0.0, 2.0, 2), (64, 64, 1.0, 0.5, 1), (8, 8, 6.0, 4.0, 4)])
def test_threads_without_a_core_are_told(threads, cores_there, busy, allowed, fitting):
    warning = advice(threads, cores_there, busy, allowed)
    assert f"OMP_NUM_THREADS={fitting} " in warning and f"{min(threads, cores_there)} threads" in warning
    assert (f"this container may use {allowed:g} of {cores_there} cores" in warning) == (allowed < INFINITE)
    assert (f"other programs keep {busy:.1f} of {cores_there} cores busy" in warning) == (allowed == INFINITE)
    assert ("stop them or set" in warning) == (allowed == INFINITE)


@pytest.mark.parametrize("threads, cores_there, busy, allowed", [
    (2, 2, 0.0, INFINITE), (2, 2, 0.4, INFINITE), (1, 2, 2.0, INFINITE), (8, 16, 7.0, INFINITE), (4, 64, 0.0, 4.0),
    (64, 64, 6.3, INFINITE), (4, 2, 0.0, INFINITE), (3, 3, 0.5, INFINITE)])
def test_threads_with_a_core_each_are_not(threads, cores_there, busy, allowed):
    assert advice(threads, cores_there, busy, allowed) == ""


@pytest.mark.parametrize("text, expected", [("max 100000\n", INFINITE), ("150000 100000\n", 1.5), ("", INFINITE)])
def test_limits_of_containers(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    assert allowed_cores() == expected
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "absent")
    assert allowed_cores() == INFINITE


class Looks:
    """A file that says something else each time it is read, the first text last."""

    def __init__(self, *texts):
        self.texts = [*texts]

    def read_text(self):
        return self.texts.pop()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which this process has the cores 1 and 3, and PyTorch two threads."""
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: {1, 3}, raising=False)
    monkeypatch.setattr(cores.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cores.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cores.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cores.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "absent")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    idle, busy = stat((0, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0), (3, 0, 0, 0, 0, 0)), (40, 0, 0, 0, 0)
    one = stat((0, 0, 0, 40, 0, 0), (1, 0, 0, 40, 0, 0), (3, *busy))
    monkeypatch.setattr(cores, "STAT", Looks(one, idle))
    cores.warn_of_busy_cores.cache_clear()
    yield monkeypatch
    cores.warn_of_busy_cores.cache_clear()


def test_the_warning_comes_once(machine, caplog):
    for _ in range(2):
        cores.warn_of_busy_cores()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "other programs keep 1.0 of 2 cores busy, and 2 threads" in caplog.text and not cores.STAT.texts


def test_it_looks_for_a_while(machine):
    slept = []
    machine.setattr(cores.time, "sleep", slept.append)
    cores.warn_of_busy_cores()
    assert slept == [cores.LOOK]


@pytest.mark.parametrize("change", [
    lambda patch: patch.setattr(cores.torch, "get_num_threads", lambda: 1),
    lambda patch: patch.setenv("OMP_WAIT_POLICY", "PASSIVE"),
    lambda patch: patch.setattr(cores.torch.cuda, "is_available", lambda: True),
    lambda patch: patch.delattr(cores.os, "sched_getaffinity")], ids=["one thread", "they sleep", "a GPU", "not Linux"])
def test_where_nothing_can_be_wrong_it_does_not_look(machine, caplog, change):
    change(machine)
    cores.warn_of_busy_cores()
    assert len(cores.STAT.texts) == 2 and not caplog.records


def test_the_work_of_this_process_is_not_that_of_others(machine, caplog):
    times = iter([0.0, cores.LOOK])
    machine.setattr(cores.time, "process_time", lambda: next(times))
    cores.warn_of_busy_cores()
    assert not caplog.records


def test_files_that_may_not_be_read_say_nothing(machine, caplog, tmp_path):
    machine.setattr(cores, "STAT", tmp_path)  # a folder: an OSError, as where a policy forbids it
    machine.setattr(cores, "QUOTA", tmp_path)
    cores.warn_of_busy_cores()
    assert not caplog.records and allowed_cores() == INFINITE


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_a_busy_core_is_seen():
    core = min(os.sched_getaffinity(0))
    if not any(cores._core_times(cores.STAT.read_text()).get(core, [])):
        pytest.skip("this kernel does not count the work of this core")
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint('works', flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as busy:
        try:
            busy.stdout.readline()
            before = cores.STAT.read_text()
            cores.time.sleep(0.5)
            assert busy_cores(before, cores.STAT.read_text(), {core}) > 0.5
        finally:
            busy.kill()
