"""Fast kernels for two operations, the neighbour sum of the operator K and the search for nearest pixels, in one table.

Everything else in the networks is PyTorch. `models/sparse_conv.py` and `models/interpolation.py` read this table and
hold the plain PyTorch forms, which model.backend=torch_dense selects.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.kernels import cpu, gpu, spconv, torchsparse


@dataclass(frozen=True)
class Backend:
    """Kernels of one package.

    devices             types of torch.device that they run on
    unavailable_reason  (depthwise) -> why they cannot be used here and what to do, "" if they can
    neighbour_sum       (features [B, L, C], weight, coords) -> [B, L, C or D]: sum over taps of weight[tap] h(p + tap)
    depthwise           whether neighbour_sum also takes weights [kh, kw, C], and not only [kh, kw, C, D]
    nearest_pixels      (coords, grid_size, k, slots), see models.interpolation; None: plain PyTorch
    """

    devices: tuple
    unavailable_reason: Callable
    neighbour_sum: Callable
    depthwise: bool = True
    nearest_pixels: Callable | None = None


BACKENDS = {
    "numba": Backend(("cpu",), cpu.unavailable_reason, cpu.neighbour_sum, nearest_pixels=cpu.nearest_pixels),
    "triton": Backend(gpu.DEVICES, gpu.unavailable_reason, gpu.neighbour_sum, nearest_pixels=gpu.nearest_pixels),
    "torchsparse": Backend(("cuda",), torchsparse.unavailable_reason, torchsparse.neighbour_sum),
    "spconv": Backend(("cpu", "cuda"), spconv.unavailable_reason, spconv.neighbour_sum, depthwise=False),
}
AUTO = ("numba", "triton")  # what model.backend=auto tries, before plain PyTorch


@torch.compiler.assume_constant_result  # torch.compile need not trace how packages are found
def obstacle(name, device, depthwise):
    """Why a backend cannot be used on a device (None: any) for weights of this kind, and what to do; "" if it can."""
    backend = BACKENDS[name]
    if depthwise and not backend.depthwise:
        return "it has no depthwise kernels (model.depthwise_sparse=True)"
    if device is not None and device.type not in backend.devices:
        return f"the model is on {device.type}, and it runs on {' or '.join(backend.devices)}"
    return backend.unavailable_reason(depthwise)
