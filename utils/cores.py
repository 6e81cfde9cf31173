"""Whether the cores that this process may use are free. Threads wait for each other many times in a training step, so
one that has no core of its own makes all of them slow."""

import functools
import logging
import os
import pathlib
import time

import torch

STAT = pathlib.Path("/proc/stat")
QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")
LOOK = 0.25  # seconds; the kernel counts in hundredths


@functools.cache
def warn_of_busy_cores():
    """Log a line, once in a process, where PyTorch would take more threads than there are cores for them. Linux only;
    takes a quarter of a second, in which this process has to be idle."""
    threads = torch.get_num_threads()
    if threads == 1 or not STAT.exists():
        return
    cores = os.sched_getaffinity(0)
    before = STAT.read_text()
    time.sleep(LOOK)
    warning = advice(threads, len(cores), busy_cores(before, STAT.read_text(), cores), allowed_cores())
    if warning:
        logging.warning(warning)


def advice(threads, cores, busy, allowed):
    """The warning for `threads` threads on `cores` cores, of which other programs keep `busy` busy (a float) while a
    container may use `allowed` (infinity: all); "" where each thread finds a core."""
    fitting = max(1, round(min(cores - busy, allowed)))
    if fitting >= threads:
        return ""
    if allowed < cores - busy:
        why, remedy = f"this container may use {allowed:g} of {cores} cores", "set"
    else:
        why, remedy = f"other programs keep {busy:.1f} of {cores} cores busy", "stop them or set"
    return (f"{why}, and {threads} threads would wait for each other: {remedy} OMP_NUM_THREADS={fitting} in the "
            "environment for a faster run (docs/running.md)")


def busy_cores(before, after, cores):
    """How many of these cores (their numbers) were busy between two texts of /proc/stat: a float. Time that the host
    gives to other virtual machines counts as busy; a core that is not in the texts, as in some containers, does not."""
    before, after = _core_times(before), _core_times(after)
    return sum(_busy_share(before[core], after[core]) for core in cores if core in before and core in after)


def _core_times(text):
    """Core -> ticks since the start as user, nice, system, idle, iowait, irq, softirq, steal."""
    lines = (line.split() for line in text.splitlines() if line.startswith("cpu") and not line.startswith("cpu "))
    return {int(core.removeprefix("cpu")): [int(tick) for tick in ticks[:8]] for core, *ticks in lines}


def _busy_share(before, after):
    ticks = [end - start for start, end in zip(before, after, strict=True)]
    return 1 - (ticks[3] + ticks[4]) / sum(ticks) if sum(ticks) > 0 else 0.0


def allowed_cores():
    """Cores' worth of time that the container may use (cgroup v2): a float, infinity where there is no limit."""
    try:
        quota, period = QUOTA.read_text().split()
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if quota == "max" else int(quota) / int(period)
