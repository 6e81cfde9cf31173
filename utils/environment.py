"""What code, which packages and which machine made a file: kept in it, so that a result can be traced."""

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

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
