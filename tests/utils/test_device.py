"""Device and precision from a config."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from ml_collections import ConfigDict

from tests.scripts import ROOT
from utils import device
from utils.device import autocast, peak_memory_gb, resolve_device, resolve_dtype
from utils.errors import UserError


def train(amp=True, precision="auto"):
    return ConfigDict({"amp": amp, "precision": precision})


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "mps", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(UserError, match=name):
            resolve_device(name)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_takes_bf16_where_the_processor_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr("utils.device._cpu_has_bf16", lambda: has_bf16)
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert resolve_dtype(train(), torch.device("cpu")) == expected
    assert resolve_dtype(train(amp=False), torch.device("cpu")) == torch.float32
    assert resolve_dtype(train(precision="fp32"), torch.device("cpu")) == torch.float32


def test_autocast_changes_products_and_float32_does_not():
    a = torch.randn(4, 4)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), torch.float32):
        assert (a @ a).dtype == torch.float32


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    held = torch.ones(300 * 2**20)  # 1.26e9 bytes
    code = "import torch; from utils.device import peak_memory_gb; print(peak_memory_gb(torch.device('cpu')))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.05 < float(ran.stdout) < 1 < peak_memory_gb(torch.device("cpu"))
    del held


def test_the_heap_is_prepared_once(monkeypatch):
    times = []
    monkeypatch.setattr(device, "_programs_ask_for_huge_pages", lambda: times.append(1))
    device.keep_freed_memory.cache_clear()
    device.keep_freed_memory()
    device.keep_freed_memory()
    assert len(times) <= 1  # none with another C library


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of Linux")
def test_the_heap_is_prepared_for_huge_pages_only_where_programs_ask_for_them(tmp_path):
    """Where all programs get them, as with this tunable of glibc 2.35, 8 GB of heap with something written every 16 MB
    would be 1 GB."""
    code = (
        "import os, pathlib, sys\n"
        "from utils import device\n"
        "def megabytes():\n"
        "    pages = open('/proc/self/statm').read().split()[:2]\n"
        "    return [int(number) * os.sysconf('SC_PAGESIZE') // 10**6 for number in pages]\n"
        "device.HUGE_PAGES = pathlib.Path(sys.argv[1])\n"
        "for setting in ('[always] madvise never', 'always madvise [never]', None, 'always [madvise] never'):\n"
        "    device.HUGE_PAGES.unlink(missing_ok=True)\n"
        "    setting is None or device.HUGE_PAGES.write_text(setting)\n"
        "    size, resident = megabytes()\n"
        "    device.keep_freed_memory.cache_clear()\n"
        "    device.keep_freed_memory()\n"
        "    print(megabytes()[0] - size, megabytes()[1] - resident)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "enabled"], cwd=ROOT, capture_output=True, text=True,
                         check=True, env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    *others, (size, _) = (tuple(map(int, line.split())) for line in ran.stdout.splitlines())
    assert len(others) == 3 and all(size < 100 and resident < 100 for size, resident in others), ran.stdout
    assert size > 8000 or platform.libc_ver()[0] != "glibc", ran.stdout
