"""Measuring: interleaved medians, peak memory, what the machine can do at most."""

import platform
import statistics
import time

import torch

SHORTEST = 2e-3  # seconds of a turn
SHORT = 10 * SHORTEST  # a function that takes less is called again in its turn


def synchronise(device):
    """Wait until `device` has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(arms, repeats, device):
    """Median seconds of each of {name: function}. After a warm-up they take turns, so that a change in the load of a
    shared machine hits all of them alike. A function that takes less than SHORT is called again until SHORTEST has
    passed, and the mean of those calls counts: the time with what it needs in the caches, and not of the first call,
    which finds there what the others left."""
    times = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name, function in arms.items():
            seconds = _mean_seconds(function, device)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _mean_seconds(function, device):
    synchronise(device)
    first = _seconds(function, device)
    if first >= SHORT:
        return first
    calls, passed = 0, 0.0
    while passed < SHORTEST:
        calls, passed = calls + 1, passed + _seconds(function, device)
    return passed / calls


def _seconds(function, device):
    started = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - started


def peak_memory(function, device):
    """Largest number of bytes in tensors while function() runs, beyond those there were before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = largest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        used += event.nbytes()
        largest = max(largest, used)
    return largest


def copy_bandwidth(device):
    """Bytes read and written per second by copies of a tensor of 256 MB."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return 2 * source.nbytes / seconds


def matmul_peak(device, dtype):
    """Floating-point operations per second of a product of two 2048² matrices."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    seconds = interleaved({"product": lambda: a @ a}, 5, device)["product"]
    return 2 * 2048**3 / seconds


def machine(device):
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    return f"{name}, {torch.get_num_threads()} threads"
