"""Each worker of pytest -n, and what it starts, gets its share of the cores. On a GPU, convolutions do not use TF32."""

import os

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before the first test imports torch
    usable = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))(0)  # on Linux only
    os.environ["OMP_NUM_THREADS"] = str(max(len(usable) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1))
