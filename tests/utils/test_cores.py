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
    lines += [f"cpu{core} {user} 0 {system} {idle} {iowait} 0 0 {steal} 7 0"
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
    assert busy_cores("", "", {0}) == 0


@pytest.mark.parametrize("threads, cores_there, busy, allowed, fitting", [
    (2, 2, 1.0, INFINITE, 1), (2, 2, 0.6, INFINITE, 1), (2, 2, 2.0, INFINITE, 1), (8, 8, 3.2, INFINITE, 5),
    (64, 64, 0.0, 2.0, 2), (64, 64, 1.0, 0.5, 1), (8, 8, 6.0, 4.0, 2)])
def test_threads_without_a_core_are_told(threads, cores_there, busy, allowed, fitting):
    warning = advice(threads, cores_there, busy, allowed)
    assert f"OMP_NUM_THREADS={fitting} " in warning and f"{threads} threads" in warning
    assert ("this container may use" in warning) == (allowed < cores_there - busy)


@pytest.mark.parametrize("threads, cores_there, busy, allowed", [
    (2, 2, 0.0, INFINITE), (2, 2, 0.4, INFINITE), (1, 2, 2.0, INFINITE), (8, 16, 7.0, INFINITE), (4, 64, 0.0, 4.0)])
def test_threads_with_a_core_each_are_not(threads, cores_there, busy, allowed):
    assert advice(threads, cores_there, busy, allowed) == ""


@pytest.mark.parametrize("text, expected", [("max 100000\n", INFINITE), ("150000 100000\n", 1.5), ("", INFINITE)])
def test_limits_of_containers(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    assert allowed_cores() == expected
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "absent")
    assert allowed_cores() == INFINITE


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_the_warning_comes_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "cpu.max").write_text("50000 100000")
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores.torch, "get_num_threads", lambda: 1000)
    cores.warn_of_busy_cores.cache_clear()
    for _ in range(2):
        cores.warn_of_busy_cores()
    cores.warn_of_busy_cores.cache_clear()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "1000 threads" in caplog.text
    monkeypatch.setattr(cores, "STAT", tmp_path / "absent")  # as on a Mac
    cores.warn_of_busy_cores()
    assert len(caplog.records) == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_a_busy_core_is_seen():
    core = min(os.sched_getaffinity(0))
    busy = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"])
    try:
        before = cores.STAT.read_text()
        cores.time.sleep(0.5)
        assert busy_cores(before, cores.STAT.read_text(), {core}) > 0.5
    finally:
        busy.kill()
        busy.wait()
