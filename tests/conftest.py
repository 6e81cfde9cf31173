"""Several processes may run the tests (pytest -n): then each, and what it starts, gets its share of the cores."""

import os

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before the first test imports torch
    share = max((os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
