"""The sparse convolution operator: which backend computes it, and how many neighbours each point has."""

import functools
import importlib
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models import tracing
from models.fft_conv import FFT_TAPS
from utils.errors import UserError


@dataclass(frozen=True)
class Backend:
    """What an implementation can compute. The code is models/backends/<name>.py, imported when first asked for:

    sparse_conv(features, weight, coords)
    unavailable_reason(depthwise=False)     why it cannot be used on this machine and what to do; "" where it can
    is_available()                          whether it can
    """

    devices: tuple  # types of torch.device
    depthwise: bool  # weights [kh, kw, C]
    full: bool  # weights [kh, kw, C, D]
    float64: bool = False  # it computes in float64 where features are float64; if not, torch_dense steps in


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run in Python, on CPU: for tests
BACKENDS = {
    "torch_dense": Backend(("cpu", "cuda", "mps", "meta"), depthwise=True, full=True, float64=True),
    "numba": Backend(("cpu",), depthwise=True, full=True, float64=True),
    "triton": Backend(("cuda", "cpu") if INTERPRETED else ("cuda",), depthwise=True, full=True),
    "torchsparse": Backend(("cuda",), depthwise=True, full=True),
    "spconv": Backend(("cpu", "cuda"), depthwise=False, full=True),
}
# The order in which "auto" asks. On CPU a dense convolution is hard to beat with full kernels unless few pixels are
# present.
AUTO = {"depthwise": ("numba", "triton", "torch_dense"), "full": ("triton", "torch_dense")}


def sparse_conv(features, weight, coords, backend="auto"):
    """Monte Carlo estimate of a convolution integral over the points in the window of each point (METHOD, operator K).

        (K h)(c) = kh kw / |N(c)| · sum over c' in N(c) of weight(c' - c) h(c')

    features  [B, L, C] at the L coordinates, float32, bfloat16, float16 or float64
    weight    [kh, kw, C] depthwise, or [kh, kw, C, D] full; kh and kw odd. weight[i, j] multiplies the neighbour at row
              offset i - kh // 2 and column offset j - kw // 2, a cross-correlation as in F.conv2d
    coords    data.coordinates.Coordinates of the L points
    backend   a name of BACKENDS, or "auto"
    Returns [B, L, C] or [B, L, D]. Raises UserError where the backend cannot be used, ValueError on wrong shapes.
    """
    if features.shape[:2] != coords.index.shape:
        raise ValueError(f"features are {tuple(features.shape)}, but there are {tuple(coords.index.shape)} coordinates")
    if weight.dim() not in (3, 4) or weight.shape[0] % 2 == 0 or weight.shape[1] % 2 == 0:
        raise ValueError(f"weight must be [kh, kw, C] or [kh, kw, C, D] with kh and kw odd, got {tuple(weight.shape)}")
    if weight.shape[2] != features.shape[2]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit features of {features.shape[2]} channels")
    name = resolve_backend(backend, features.device, weight.dim() == 3)
    if features.dtype == torch.float64 and not BACKENDS[name].float64:
        name = "torch_dense"  # rather than round
    if weight.dim() == 3 and math.prod(weight.shape[:2]) >= FFT_TAPS:
        name = "torch_dense"  # which takes FFTs for it: no loop over so many neighbours is as fast
    return importlib.import_module(f"models.backends.{name}").sparse_conv(features, weight, coords)


def available_backends():
    """Names of the backends that can be used on this machine."""
    return [name for name in BACKENDS if not _unavailable_reason(name, depthwise=False)]


@tracing.constant  # torch.compile need not trace how it is found
def resolve_backend(name, device, depthwise):
    """The backend that `name` ("auto" or a name of BACKENDS) stands for.

    device     torch.device of the features, or None where it is not known yet
    depthwise  whether the weight is [kh, kw, C]
    Raises UserError where there is no such backend, or it cannot be used here.
    """
    if name == "auto":
        candidates = AUTO["depthwise" if depthwise else "full"]
        return next(candidate for candidate in candidates if not _unsuitable(candidate, device, depthwise))
    if name not in BACKENDS:
        raise UserError(f"model.backend={name!r} is not one of auto, {', '.join(BACKENDS)}; use auto")
    reason = _unsuitable(name, device, depthwise)
    if reason:
        usable = ", ".join(["auto", *(other for other in BACKENDS if not _unsuitable(other, device, depthwise))])
        raise UserError(f"model.backend={name!r} cannot be used: {reason}; usable here: {usable}")
    return name


def neighbour_counts(coords, kernel_size):
    """Number of points in the window (kh, kw) around each point, itself included: |N(c)|, float32 [B, L], integers."""
    return coords.cached(("neighbour_counts", tuple(kernel_size)), lambda: _neighbour_counts(coords, *kernel_size))


def _neighbour_counts(coords, kh, kw):
    if coords.is_raster:
        rows, columns = (_inside(*axis, coords.device) for axis in zip(coords.size, (kh, kw), strict=True))
        return torch.outer(rows, columns).flatten().repeat(coords.batch, 1)
    count = (coords.table >= 0).float().view(coords.batch, *coords.size)
    for axis, k, padding in ((1, kh, (0, 0, kh // 2 + 1, kh // 2)), (2, kw, (kw // 2 + 1, kw // 2))):
        up_to = F.pad(count, padding).cumsum(axis)  # whole numbers, far below 2^24
        count = up_to.narrow(axis, k, coords.size[axis - 1]) - up_to.narrow(axis, 0, coords.size[axis - 1])
    return count.flatten(1).gather(1, coords.index)


def _inside(length, k, device):
    """How many of the k pixels around each pixel of an axis lie in the image, float32 [length]."""
    pixel = torch.arange(length, device=device)
    return ((pixel + k // 2).clamp(max=length - 1) - (pixel - k // 2).clamp(min=0) + 1).float()


def _unsuitable(name, device, depthwise):
    """Why a backend cannot be used for this; "" where it can."""
    backend = BACKENDS[name]
    if not (backend.depthwise if depthwise else backend.full):
        return f"it has no {'depthwise' if depthwise else 'full'} kernels (model.depthwise_sparse={depthwise})"
    if device is not None and device.type not in backend.devices:
        return f"the model is on {device.type}, and it runs on {' or '.join(backend.devices)}"
    return _unavailable_reason(name, depthwise)


@functools.cache
def _unavailable_reason(name, depthwise):
    return importlib.import_module(f"models.backends.{name}").unavailable_reason(depthwise)
