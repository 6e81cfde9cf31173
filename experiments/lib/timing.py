"""Measuring functions on a machine: time, peak memory, and the peak rates of the machine to compare with."""

import itertools
import statistics
import time

import torch

MIN_TURN = 2e-3  # seconds for which a short function is repeated
SHORT = 10 * MIN_TURN  # seconds of one call


def interleaved(arms, repeats, device):
    """Median seconds of {name: function}.

    After a warm-up the functions take turns, so that a change in the load of the machine affects all of them. Short
    functions are repeated for MIN_TURN after a call that is not counted, as other functions have evicted its caches.
    """
    times = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name, function in arms.items():
            seconds = _seconds_of_turn(function, device)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds_of_turn(function, device):
    _synchronise(device)
    first = _seconds(function, device)
    if first >= SHORT:
        return first
    calls, passed = 0, 0.0
    while passed < MIN_TURN:
        calls, passed = calls + 1, passed + _seconds(function, device)
    return passed / calls


def _seconds(function, device):
    started = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(function, device):
    """Largest number of bytes in tensors during function(), beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes), default=0)


def copy_bandwidth(device):
    """Bytes read and written per second by copies of a tensor of 256 MB."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleaved({"copy": lambda: target.copy_(source)}, 5, device)["copy"]


def matmul_peak(device, dtype):
    """Floating-point operations per second of a product of two 2048² matrices."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    return 2 * 2048**3 / interleaved({"product": lambda: a @ a}, 5, device)["product"]
