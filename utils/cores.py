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
LEAST = 0.1  # share of the cores that others have to use before it is told: some work is always done on a large machine


@functools.cache
def warn_of_busy_cores():
    """Log a line, once in a process, where others use so many of its cores that some of PyTorch's threads find none.
    Takes a quarter of a second. Linux only; not where threads sleep while they wait, and not where there is a GPU."""
    threads = torch.get_num_threads()
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if threads == 1 or passive or torch.cuda.is_available() or not hasattr(os, "sched_getaffinity"):
        return
    cores = os.sched_getaffinity(0)
    before, own = _read(STAT), time.process_time()
    time.sleep(LOOK)
    busy = busy_cores(before, _read(STAT), cores) - (time.process_time() - own) / LOOK
    warning = advice(threads, len(cores), busy, allowed_cores())
    if warning:
        logging.warning(warning)


def advice(threads, cores, busy, allowed):
    """The warning for `threads` threads on `cores` cores (hyperthreads count), of which other programs keep `busy` busy
    (a float) while a container may use `allowed` (infinity: all); "" where each thread finds a core, and about more
    threads than cores, which somebody has asked for."""
    threads = min(threads, cores)
    if allowed < threads:
        why, remedy, free = f"this container may use {allowed:g} of {cores} cores", "set", allowed
    elif busy >= max(0.5, LEAST * cores):
        why, remedy, free = f"other programs keep {busy:.1f} of {cores} cores busy", "stop them or set", cores - busy
    else:
        return ""
    fitting = max(1, int(free + 0.5))
    if fitting >= threads:
        return ""
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
    ticks = [max(end - start, 0) for start, end in zip(before, after, strict=True)]  # iowait may decrease
    return 1 - (ticks[3] + ticks[4]) / sum(ticks) if any(ticks) else 0.0


def allowed_cores():
    """Cores' worth of time that the container may use (cgroup v2): a float, infinity where there is no limit."""
    quota, _, period = _read(QUOTA).partition(" ")
    return int(quota) / int(period) if quota.isdigit() else float("inf")


def _read(path):
    """The text of a file of the kernel; "" where there is none, or none for this process."""
    try:
        return path.read_text()
    except OSError:
        return ""
