"""Run a script of the project on the GPU of nullgpu.c, and count what its training steps do.

    python tests/nullgpu/steps.py train_inf_ae_diffusion.py --config …

A wait for the GPU from the third step on raises. Prints a line of JSON for each step of the
first rank: launches, waits and peak memory in GiB.
"""

import ctypes
import json
import os
import runpy
import sys

sys.path.insert(0, os.getcwd())

import torch

from utils.trainer import Trainer

gpu = ctypes.CDLL("libcuda.so.1")
gpu.nullgpu_total.restype = gpu.nullgpu_syncs.restype = ctypes.c_long
step, found = Trainer.training_step, []
torch.Tensor.isfinite = lambda tensor: torch.ones(tensor.shape, dtype=torch.bool)  # no kernel would say so


def counted(self, batches):
    gpu.nullgpu_zero(len(found) >= 2)  # small reads by the host give zeros, not what memory happens to hold
    gpu.nullgpu_reset()
    torch.cuda.reset_peak_memory_stats()
    if len(found) >= 2:
        torch.cuda.set_sync_debug_mode("error")
    step(self, batches)
    torch.cuda.set_sync_debug_mode(0)
    found.append([gpu.nullgpu_total(), gpu.nullgpu_syncs(), torch.cuda.max_memory_allocated() / 2**30])
    if os.environ.get("RANK", "0") == "0":
        print("\n" + json.dumps(found[-1]), flush=True)


Trainer.training_step = counted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
