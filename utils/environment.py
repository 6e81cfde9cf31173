"""What code and which packages made a file: kept in it, so that a result can be traced."""

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "scipy", "numba", "ml_collections", "Pillow", "safetensors")


@functools.cache
def environment():
    """{"python", "packages": {name: version}, "commit"}; a package that is not installed is left out, and the commit
    is "" outside a git checkout (with "-dirty" at its end where tracked files differ from it)."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "packages": packages, "commit": _commit()}


def _commit():
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=ROOT,
                               capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
