"""Kernels for CPUs: loops that numba compiles, in models/kernels/cpu_loops.py.

Half precision is widened to float32 in front of the loops. Results do not depend on the number of threads.
"""

import functools
import logging
import pathlib
import threading

import torch
import torch.nn.functional as F

from models.kernels.autograd import define_operator

_lock = threading.Lock()  # one of numba's threading layers is not thread-safe


@functools.cache
def unavailable_reason(depthwise=True):
    """Why the loops cannot be compiled here and what to do; "" if they can."""
    try:
        import numba  # noqa: F401  # imported on demand: it takes half a second, and may be missing
    except ImportError as error:
        return f"numba cannot be imported ({error}); `pip install numba`, or use model.backend=torch_dense"
    return ""


def neighbour_sum(features, weight, coords):
    """sum over taps of weight[tap] h(p + tap): features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D] ->
    [B, L, C or D], in the dtype of the features. Full weights need no loop: they are a matrix product per tap."""
    start, near, tap = coords.cached(("neighbours", *weight.shape[:2]), lambda: _neighbours(coords, *weight.shape[:2]))
    if weight.dim() == 3:
        return _operator(features, weight, [start, near, tap])
    order = tap.argsort(stable=True)
    counts = tap.bincount(minlength=weight[..., 0, 0].numel()).tolist()
    pairs = zip(torch.repeat_interleave(start.diff())[order].split(counts), near.long()[order].split(counts),
                _taps(weight), strict=True)
    with torch.autocast("cpu", enabled=False):
        rows = _rows(features)
        out = rows.new_zeros(len(rows), weight.shape[3])
        for point, neighbour, matrix in pairs:
            out = out.index_add(0, point, rows[neighbour] @ matrix)
    return out.unflatten(0, features.shape[:2]).to(features.dtype)


def _neighbours(coords, kh, kw):
    """All pairs of a point and a point in its window, point by point, with the points of all images numbered through.

    start  int64 [B · L + 1]: those of point p are start[p] ... start[p + 1] - 1
    near   int32 [pairs]: the other point
    tap    int16 [pairs]: row · kw + column in the kernel
    """
    table = F.pad(coords.table.unflatten(1, coords.size), (kw // 2, kw // 2, kh // 2, kh // 2), value=-1)
    start = torch.zeros(coords.index.numel() + 1, dtype=torch.int64)
    _run("count_neighbours", coords.index.contiguous(), table, (kh, kw), start)
    start = start.cumsum(0)
    near, tap = (torch.empty(int(start[-1]) + 1, dtype=dtype) for dtype in (torch.int32, torch.int16))
    _run("list_neighbours", coords.index.contiguous(), table, (kh, kw), start, near, tap)
    return start, near[:-1], tap[:-1]


def nearest_pixels(table, size, grid_size, k, slots):
    """See models.interpolation.nearest_pixels: (place int64, squared distance float32), both [B, G², slots]."""
    place = torch.zeros(len(table), grid_size**2, slots, dtype=torch.int64)
    squared_distance = torch.full(place.shape, torch.inf)
    _run("nearest", table.contiguous(), *size, grid_size, k, place, squared_distance)
    return place, squared_distance


def _neighbour_sum(features, weight, start, near, tap):
    out = torch.empty(features.shape, dtype=_wide(features))
    _run("neighbour_sum", _rows(features), _taps(weight), start, near, tap, out.flatten(0, 1))
    return out.to(features.dtype)


def _weight_gradient(features, grad, weight, start, near, tap):
    out = torch.empty(weight.shape, dtype=_wide(features))
    _run("weight_gradient", _rows(features), _rows(grad), start, near, tap, out.flatten(0, 1))
    return out.to(weight.dtype)


_operator = define_operator("numba_neighbour_sum", "cpu", _neighbour_sum, _weight_gradient)


def _wide(values):
    return torch.promote_types(values.dtype, torch.float32)


def _rows(values):
    return values.to(_wide(values)).flatten(0, 1).contiguous()


def _taps(weight):
    return weight.to(_wide(weight)).flatten(0, 1).contiguous()


def _run(name, *arguments):
    """Call a loop of cpu_loops on numbers and CPU tensors, with as many threads as PyTorch uses."""
    loop = _loop(name)
    arrays = [a.detach().numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
    import numba

    with _lock:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        loop(*arrays)


@functools.cache
def _loop(name):
    import numba

    import models.kernels.cpu_loops as cpu_loops

    loop = getattr(cpu_loops, name)
    folder = loop.stats.cache_path
    if folder is None or not any(pathlib.Path(folder).glob(f"cpu_loops.{name}-*.nbc")):
        logging.getLogger(__name__).info("compiling the loop %s for this CPU, which takes some seconds%s", name,
                                         "" if folder else " (no folder for numba's cache is writable)")
    threads = torch.get_num_threads()
    numba.set_num_threads(1)  # starts numba's threads; with a shared OpenMP runtime that changes PyTorch's number
    torch.set_num_threads(threads)
    return loop
