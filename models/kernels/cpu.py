"""Kernels for CPUs: loops compiled by numba, in models/kernels/cpu_loops.py.

Half precision is widened to float32 before the loops. Results do not depend on the number of threads.
"""

import functools
import logging
import math
import pathlib
import threading

import torch
import torch.nn.functional as F

from models.kernels.operators import define_nearest_pixels, define_neighbour_sum

_lock = threading.Lock()  # one of numba's threading layers is not thread-safe


@functools.cache
def unavailable_reason(depthwise):
    """Why the loops cannot be compiled here and what to do; "" if they can."""
    try:
        import numba  # noqa: F401  # imported on demand: it takes half a second, and may be missing
    except ImportError as error:
        return f"numba cannot be imported ({error}); `pip install numba`, or use model.backend=torch_dense"
    return ""


def neighbour_sum(features, weight, coords):
    """sum over taps of weight[tap] h(p + tap): features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D] ->
    [B, L, C or D], in the dtype of the features. Full weights need no loop: they are a matrix product per tap."""
    geometry = coords.cached(("neighbours", *weight.shape[:2]), lambda: _neighbours(coords, *weight.shape[:2]))
    if weight.dim() == 3:
        return _neighbour_sum(features, weight, geometry)
    return _full_neighbour_sum(features, weight, *geometry)


def nearest_pixels(coords, grid_size, k, slots):
    """See models.interpolation.nearest_pixels: (place int64, squared distance float32), both [B, G², slots]."""
    return _nearest_pixels(coords.table, *coords.size, grid_size, k, slots)


def _neighbours(coords, kh, kw):
    """[start, near, tap], see _list_neighbours."""
    table = F.pad(coords.table.unflatten(1, coords.size), (kw // 2, kw // 2, kh // 2, kh // 2), value=-1)
    return list(_list_neighbours(coords.index.contiguous(), table, kh, kw))


@torch.library.custom_op("infty_diff::numba_list_neighbours", mutates_args=(), device_types="cpu")
def _list_neighbours(
    index: torch.Tensor, table: torch.Tensor, kh: int, kw: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All pairs of a point and a point in its window, point by point, with the points of all images numbered through.

    start  int64 [B · L + 1]: those of point p are start[p] ... start[p + 1] - 1
    near   int32 [B · L · kh · kw]: the other point
    tap    int16, likewise: row · kw + column in the kernel
    Entries from the last start on are not written, so that most of their memory is never touched.
    """
    start, near, tap = _empty_neighbours(index, table, kh, kw)
    _run(_loops().count_neighbours, index, table, (kh, kw), start.zero_())
    start = start.cumsum(0)
    _run(_loops().list_neighbours, index, table, (kh, kw), start, near, tap)
    return start, near, tap


@_list_neighbours.register_fake
def _empty_neighbours(index, table, kh, kw):
    points = index.numel()
    return (index.new_empty(points + 1), index.new_empty(points * kh * kw, dtype=torch.int32),
            index.new_empty(points * kh * kw, dtype=torch.int16))


def _depthwise(features, weight, start, near, tap):
    out = torch.empty(features.shape, dtype=_wide(features))
    _run(_loops().neighbour_sum, _rows(features), _taps(weight), start, near, tap, out.flatten(0, 1))
    return out.to(features.dtype)


def _depthwise_weight_gradient(features, grad, weight, start, near, tap):
    out = torch.empty(weight.shape, dtype=_wide(features))
    _run(_loops().weight_gradient, _rows(features), _rows(grad), start, near, tap, out.flatten(0, 1))
    return out.to(weight.dtype)


def _full_neighbour_sum(features, weight, start, near, tap):
    pairs = int(start[-1])
    order = tap[:pairs].argsort(stable=True)
    counts = tap[:pairs].bincount(minlength=math.prod(weight.shape[:2])).tolist()
    points = torch.repeat_interleave(start.diff())[order].split(counts)
    neighbours = near[:pairs].long()[order].split(counts)
    with torch.autocast("cpu", enabled=False):
        rows = _rows(features)
        out = rows.new_zeros(len(rows), weight.shape[3])
        for point, neighbour, matrix in zip(points, neighbours, _taps(weight), strict=True):
            out = out.index_add(0, point, rows[neighbour] @ matrix)
    return out.unflatten(0, features.shape[:2]).to(features.dtype)


def _search(table, height, width, grid_size, k, place, squared_distance):
    _run(_loops().nearest, table, height, width, grid_size, k, place, squared_distance)


_neighbour_sum = define_neighbour_sum("numba_neighbour_sum", "cpu", _depthwise, _depthwise_weight_gradient)
_nearest_pixels = define_nearest_pixels("numba_nearest_pixels", "cpu", _search)


def _wide(values):
    return torch.promote_types(values.dtype, torch.float32)


def _rows(values):
    return values.to(_wide(values)).flatten(0, 1).contiguous()


def _taps(weight):
    return weight.to(_wide(weight)).flatten(0, 1).contiguous()


def _loops():
    import models.kernels.cpu_loops as cpu_loops  # imported on demand: numba may be missing

    return cpu_loops


def _run(loop, *arguments):
    """Call a loop on numbers and CPU tensors, with as many threads as PyTorch uses."""
    import numba

    arrays = [a.detach().numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
    with _lock:
        _announce(loop)
        _start_threads()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        loop(*arrays)


@functools.cache
def _announce(loop):
    """Log once that a loop is about to be compiled, unless numba's cache on disk has it."""
    folder, name = loop.stats.cache_path, loop.py_func.__name__
    if folder is None or not any(pathlib.Path(folder).glob(f"cpu_loops.{name}-*.nbc")):
        logging.getLogger(__name__).info("compiling the loop %s for this CPU, which takes some seconds%s", name,
                                         "" if folder else " (no folder for numba's cache is writable)")


@functools.cache
def _start_threads():
    """Start numba's threads. With a shared OpenMP runtime that changes PyTorch's number of threads, so restore it."""
    import numba

    threads = torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(threads)
