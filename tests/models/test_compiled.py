import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from data.coordinates import Coordinates
from models import compiled
from models.nearest import nearest_pixels

pytestmark = pytest.mark.skipif(not compiled.is_available(), reason=compiled.unavailable_reason())


def test_says_so_when_it_compiles(caplog, tmp_path, monkeypatch):
    class Kernel:
        class stats:
            cache_path = str(tmp_path)

    monkeypatch.setattr("models.loops.nearest.pretend", Kernel, raising=False)
    with caplog.at_level(logging.INFO):
        compiled._kernel("nearest.pretend")
        assert "compiling nearest.pretend" in caplog.text
        caplog.clear()
        compiled._kernel.cache_clear()
        (tmp_path / "nearest.pretend-10.py311.1.nbc").touch()
        compiled._kernel("nearest.pretend")
        assert not caplog.text
    compiled._kernel.cache_clear()


def test_threads_may_call_at_the_same_time():
    coords = [Coordinates.random(2, (16, 16), 30 + n) for n in range(40)]
    expected = [nearest_pixels(c, 8, 3)[0] for c in coords]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda c: nearest_pixels(c, 8, 3)[0], coords))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_refuses_what_a_loop_would_read_wrongly():
    for tensor in (torch.zeros(4, 3).T, torch.zeros(4, dtype=torch.float64), torch.zeros(4, device="meta")):
        with pytest.raises(ValueError, match="misread"):
            compiled.run_at("nearest.nearest", [(torch.float32, torch.zeros(3), tensor)])
    with FakeTensorMode(), pytest.raises(ValueError, match="without numbers, FakeTensor"):
        compiled.run_at("nearest.nearest", [(torch.float32, torch.zeros(3))])


def test_every_thread_gets_as_many_threads_as_torch_has():
    import numba

    def threads_of_a_loop(_=None):
        nearest_pixels(Coordinates.random(1, (8, 8), 9), 4, 3)
        return numba.get_num_threads()

    before = torch.get_num_threads()
    try:
        for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS), 1):
            torch.set_num_threads(threads)
            with ThreadPoolExecutor(1) as pool:
                assert [threads_of_a_loop(), *pool.map(threads_of_a_loop, range(2))] == [threads] * 3
    finally:
        torch.set_num_threads(before)


def check_elsewhere(code):
    """Run Python code in a new process, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_leaves_the_number_of_threads_alone():
    check_elsewhere(
        "import torch\n"
        "from data.coordinates import Coordinates\n"
        "from models.nearest import nearest_pixels\n"
        "nearest_pixels(Coordinates.random(1, (8, 8), 9), 4, 3)\n"
        "assert torch.get_num_threads() == 1, torch.get_num_threads()\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_step():
    check_elsewhere(
        "import torch\n"
        "from utils.device import resolve_device\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "resolve_device('cpu')\n"
        "before = resident()\n"
        "for _ in range(3):\n"
        "    torch.ones(10_000_000)\n"
        "assert resident() - before > 30e6\n"
    )


def test_no_folder_to_write_to_is_no_obstacle():
    """An installation that cannot be written to, and no cache folder: the loops are compiled for this process."""
    check_elsewhere(
        "from numba.core.caching import CacheImpl\n"
        "CacheImpl._locator_classes = []\n"
        "from models import compiled\n"
        "from models.loops import nearest\n"
        "assert nearest.nearest.stats.cache_path is None\n"
        "assert compiled._kernel('nearest.nearest')[1] is nearest.nearest\n"
    )


def test_an_installation_without_numba_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.unavailable_reason.cache_clear()
    try:
        assert not compiled.is_available()
        assert "pip install numba" in compiled.unavailable_reason()
    finally:
        compiled.unavailable_reason.cache_clear()
