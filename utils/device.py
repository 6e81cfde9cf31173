"""The device and the arithmetic a run uses, from the config.

What code, which packages and which machine made a file: kept in it, so that a result can be traced.
"""

import contextlib
import ctypes
import functools
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from utils import distributed
from utils.errors import UserError

HEAP_BLOCK, HEAP_BLOCKS = 2**24, 512  # bytes, 8 GB in all, of which nothing is used yet
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name):
    """torch.device of run.device: auto takes the GPU where there is one; of several processes each has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.world_size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise UserError(f"run.device={name!r} would put {distributed.world_size()} processes on one GPU; use cuda")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"run.device={name!r} must be auto, cpu, cuda or cuda:<number>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"run.device={name!r} is not on this machine ({torch.cuda.device_count()} GPUs found); "
                        "use run.device=auto, and no more processes than GPUs")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for what is made without a device: streams, kernels, the network's buffers
    return device


def resolve_dtype(train, device):
    """Autocast dtype of the train section: `precision`, or float32 where `amp` is off.

    auto takes bf16 where the hardware has it (also CPUs with avx512_bf16 or amx), else fp16 on a GPU, else float32.
    """
    if not train.amp:
        return torch.float32
    if train.precision == "auto":
        return DTYPES[_best_precision(device)]
    if train.precision == "fp16" and device.type == "cpu":
        raise UserError("train.precision='fp16' needs a GPU; on a CPU use bf16, fp32 or auto")
    return DTYPES[train.precision]


def _best_precision(device):
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _cpu_has_bf16() else "fp32"


@functools.cache
def _cpu_has_bf16():
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # absent in some builds of torch
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def autocast(device, dtype):
    """Context of mixed precision: torch.autocast, or nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def peak_memory_gb(device):
    """Most memory that tensors of this process have taken on a GPU or, on a CPU, the whole process; in 10^9 bytes.
    0 on Windows without a GPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # what getrusage says includes the memory of the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(peak.split()[1]) * 1024 / 1e9, 3)
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


@functools.cache
def keep_freed_memory():
    """Have glibc keep what is freed for the next step, in this process; does nothing with other C libraries, nor when
    it is called again.

    It would return the memory of large tensors to the kernel each time, and the page faults when they are made again
    cost up to twice as much as the loops of the sparse operator, and a sixth of the time of convolutions.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_MMAP_THRESHOLD, below which tensors live on the heap (older versions refuse more than 32 MB), and then
    # M_TRIM_THRESHOLD: the heap never shrinks
    if mallopt and (mallopt(-3, 2**28) or mallopt(-3, 2**25)):
        mallopt(-1, -1)
        if _programs_ask_for_huge_pages():
            _use_huge_pages()


def _programs_ask_for_huge_pages():
    """Whether Linux gives them to programs that ask; it may also give them to all, or to none."""
    try:
        return "[madvise]" in HUGE_PAGES.read_text()
    except OSError:
        return False


def _use_huge_pages():
    """Ask for pages of 2 MB instead of 4 kB in the part of the heap that tensors will live on: fewer misses in the
    processor's table of pages, a tenth of the time of a training step. Memory is taken only when it is used."""
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    libc.sbrk.argtypes, libc.malloc.argtypes = [ctypes.c_ssize_t], [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    start = libc.sbrk(0)
    for block in [libc.malloc(HEAP_BLOCK) for _ in range(HEAP_BLOCKS)]:  # the heap grows, and keeps what is freed
        libc.free(block)
    page = 2**21
    start, end = -(-start // page) * page, libc.sbrk(0) // page * page
    if end > start:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 14)  # MADV_HUGEPAGE


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "scipy", "numba", "ml_collections", "Pillow", "scikit-image", "safetensors")


@functools.cache
def environment():
    """{"python", "packages": {name: version}, "commit", "machine"}; a package that is not installed is left out, and
    the commit is "" outside a git checkout (with "-dirty" at its end where tracked files differ from it)."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "packages": packages, "commit": _commit(),
            "machine": _machine()}


def _commit():
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=ROOT,
                               capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _machine():
    """System, processor and its cores, and the GPUs if this process uses any."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [platform.platform(terse=True), f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"]
    if torch.cuda.is_initialized():  # asking before would take memory of a GPU that the run may not use
        parts += [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return "; ".join(parts)
