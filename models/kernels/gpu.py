"""Kernels for GPUs, written in Triton: models/kernels/gpu_kernels.py.

Features are float32, float16 or bfloat16, and so is the result. Sums are taken in float32, in a fixed order. Full
weights are multiplied by tensor cores, in the half precision of the features or, if PyTorch allows it, in TF32.

With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, slowly, in Python: for tests.
"""

import math
import os

import torch
import torch.nn.functional as F

from models.kernels.operators import define_nearest_pixels, define_neighbour_sum
from utils.device import triton_problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
# Block sizes. With four warps none of the kernels spills registers on an A100 or H100.
POINTS, CHANNELS = 32, 64  # depthwise
SIDE = {2: 64, 4: 32}  # of the blocks of a matrix product, by the bytes per number
PARTS = {"depthwise": 256, "full": 32}  # of the points, each with kh · kw programs, in the gradient of the weight
REACH = 7  # the search for nearest pixels reads the window of so many pixels on each side of a node
PIXELS = 256  # pixels read at a time where that is too few, and the whole image is searched


def unavailable_reason(depthwise):
    """Why the kernels cannot be used here and what to do; "" if they can."""
    return "" if INTERPRETED else triton_problem()


def neighbour_sum(features, weight, coords):
    """sum over taps of weight[tap] h(p + tap): features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D] ->
    [B, L, C or D], in the dtype of the features."""
    return _neighbour_sum(features, weight, _geometry(coords, weight.shape[:2]))


def nearest_pixels(coords, grid_size, k, slots):
    """See models.interpolation.nearest_pixels: (place int64, squared distance float32), both [B, G², slots]."""
    return _nearest_pixels(coords.table, *coords.size, grid_size, k, slots)


def _geometry(coords, kernel_size):
    """The geometry that the kernels need, cached on the coordinates: [position, table].

    table      int32 [B, H + kh - 1, W + kw - 1]: the point of each pixel, numbered through the batch, or -1 for absent
               pixels and for the margin, so that kernels need no test for the border
    position   int32 or int64 [B, L]: index of each point in the flattened table
    """
    return coords.cached(("padded table", *kernel_size), lambda: _pad_table(coords, *kernel_size))


def _pad_table(coords, kh, kw):
    height, width = coords.size
    image = torch.arange(coords.batch, dtype=torch.int32, device=coords.device)[:, None]
    points = torch.where(coords.table >= 0, image * coords.num_points + coords.table, -1)
    table = F.pad(points.unflatten(1, coords.size), (kw // 2, kw // 2, kh // 2, kh // 2), value=-1)
    row, column = coords.index // width + kh // 2, coords.index % width + kw // 2
    position = (image.long() * (height + kh - 1) + row) * (width + kw - 1) + column
    dtype = torch.int32 if table.numel() < 2**31 else torch.int64
    return [position.to(dtype, memory_format=torch.contiguous_format), table]


def _launch_neighbour_sum(features, weight, position, table):
    kh, kw, inputs, outputs = *weight.shape[:3], weight.shape[-1]
    out = features.new_empty(*position.shape, outputs)
    sizes = position.numel(), table.shape[2]
    with torch.cuda.device_of(features):
        if weight.dim() == 3:
            block = _block(outputs, CHANNELS)
            _kernels().depthwise[_ceil(position.numel(), POINTS), _ceil(outputs, block)](
                features.contiguous(), weight.contiguous(), position, table, out, *sizes, outputs, kh, kw, POINTS,
                block)
        else:
            features, weight = _factors(features, weight)
            side = SIDE[features.element_size()]
            blocks = side, _block(inputs, side, 16), _block(outputs, side, 16)
            _kernels().full[_ceil(position.numel(), side), _ceil(outputs, blocks[2])](
                features, weight, position, table, out, *sizes, inputs, outputs, kh, kw, _precision(), *blocks,
                num_stages=_stages(features))
    return out


def _launch_weight_gradient(features, grad, weight, position, table):
    kh, kw, *channels = weight.shape
    if weight.dim() == 3:
        kind, kernel, side = "depthwise", _kernels().depthwise_weight_gradient, POINTS
        features, grad, constants = features.contiguous(), grad.contiguous(), (kh, kw)
        blocks = [_block(*channels, CHANNELS)]
    else:
        features, grad = _factors(features, grad)
        kind, kernel, side = "full", _kernels().full_weight_gradient, SIDE[features.element_size()]
        constants = kh, kw, _precision()
        blocks = [_block(count, side, 16) for count in channels]
    points = position.numel()
    span = side * _ceil(points, side * PARTS[kind])  # points of a part
    parts = _ceil(points, span)
    partial = features.new_empty(parts, *weight.shape, dtype=torch.float32)
    with torch.cuda.device_of(features):
        kernel[(parts * kh * kw, *map(_ceil, channels, blocks))](
            features, grad, position, table, partial, points, table.shape[2], *channels, span, *constants, side,
            *blocks, num_stages=_stages(features))
    return partial.sum(0).to(weight.dtype)


def _launch_search(table, height, width, grid_size, k, place, squared_distance):
    common = math.gcd(height, width)
    units = width // common, height // common, 2 * height * width * grid_size // common
    with torch.cuda.device_of(table):
        _kernels().nearest[(len(table) * grid_size**2,)](
            table, place, squared_distance, height, width, *units, grid_size, k, place.shape[2], REACH,
            _block(2 * REACH + 1, 2**10), PIXELS, num_warps=1)


_neighbour_sum = define_neighbour_sum(
    "triton_neighbour_sum", ("cuda", "cpu"), _launch_neighbour_sum, _launch_weight_gradient)
_nearest_pixels = define_nearest_pixels("triton_nearest_pixels", ("cuda", "cpu"), _launch_search)


def _kernels():
    import models.kernels.gpu_kernels as gpu_kernels  # imported on demand: Triton may be missing

    return gpu_kernels


def _factors(first, second):
    """Both factors of matrix products, contiguous, in the dtype of the first. The interpreter has no bfloat16."""
    dtype = torch.float32 if INTERPRETED else first.dtype
    return first.to(dtype).contiguous(), second.to(dtype).contiguous()


def _precision():
    """The precision of float32 matrix products, as set in PyTorch."""
    matmul = torch.backends.cuda.matmul  # since PyTorch 2.9 reading the older setting raises if the newer one was set
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def _stages(features):
    """Stages of the software pipeline. Triton 3.2 (PyTorch 2.6) cannot compile more than one with float32 products."""
    import triton  # imported on demand: it may be missing

    return 1 if features.element_size() == 4 and triton.__version__.startswith("3.2.") else 3


def _block(channels, most, least=1):
    """Channels per program, a power of two; matrix products need at least 16."""
    return max(min(1 << (channels - 1).bit_length(), most), least)


def _ceil(count, block):
    return -(-count // block)
