"""Exact nearest present pixels of the nodes of a regular grid.

Pixel (row, column) of an H×W image and node (i, j) of a G×G grid sit at their centres in [0, 1]², so their offset along
the axis of rows is ((2 row + 1) G - (2 i + 1) H) / (2 H G). With g = gcd(H, W), the squared distance is

    (W/g ((2 row + 1) G - (2 i + 1) H))² + (H/g ((2 column + 1) G - (2 j + 1) W))²    in units of (g / (2 H W G))².

Those are integers, which float64 holds exactly up to 2^53, so equal distances compare equal and ties are well defined.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models import compiled
from models.backends import triton
from models.sparse_conv import INTERPRETED

MEAN_POINTS = 10  # a node looks at the pixels of a disc that holds 10 k points on average; those left over search on
LONGEST_LIST = 2**12
MAX_OFFSETS = 2**22  # of all lists together
CHUNK = 2**24  # elements that the torch search holds at a time
WARP = 32  # nodes of a program on a GPU, a thread each


@torch.compiler.disable
def nearest_pixels(coords, grid_size, k):
    """The k present pixels nearest to every node ((i + 0.5) / G, (j + 0.5) / G), G = grid_size, measured in [0, 1]².

    Returns (place int64 [B, G * G, k], squared_distance float32 [B, G * G, k]) in ascending order of distance, and of
    raster index where distances are equal. `place` is the place in coords.index. Nodes are in raster order.
    Raises ValueError where an image has fewer than k pixels.
    """
    if not 1 <= k <= coords.num_points:
        raise ValueError(f"k={k} nearest pixels do not exist; each image has {coords.num_points}")
    table = coords.table[:1] if coords.is_raster else coords.table  # full images have one geometry
    offsets = _offsets(coords.size, grid_size, coords.num_points, k, coords.device)
    search = _choose_search(coords.device)
    place, squared_distance = search(table.view(-1, *coords.size), offsets, grid_size, k)
    if coords.is_raster:
        return place.expand(coords.batch, -1, -1), squared_distance.expand(coords.batch, -1, -1)
    return place, squared_distance


@dataclass(frozen=True)
class _Offsets:
    """Which pixels to look at around a node, nearest first, in images padded by `reach` (rows, columns) on each side.

    The first of pixels start[0, i] + start[1, j] + order[phase[0, i] + phase[1, j]] that is present is the one nearest
    to node (i, j), the second one is the second nearest, and so on: ties are in raster order, and no pixel that is not
    listed is as near as the last that is. Nodes that lie alike in the pixel that holds them share a list.

    start       int64 [2, G], phase int64 [2, G]
    order       int64 [lists, n]
    distance    float32 [lists, n], squared distances in [0, 1]²
    unit        squared distance in [0, 1]² of which the integers of the search are multiples
    """

    reach: tuple
    start: torch.Tensor
    phase: torch.Tensor
    order: torch.Tensor
    distance: torch.Tensor
    unit: float


@functools.lru_cache(maxsize=16)
def _offsets(size, grid_size, num_points, k, device):
    height, width = size
    phases = math.prod(grid_size // math.gcd(grid_size, length) for length in size)
    area = min(MEAN_POINTS * k * height * width / num_points, LONGEST_LIST, MAX_OFFSETS / phases)
    reach = [max(math.ceil(math.sqrt(area / math.pi * length / other)), 1) for length, other in (size, size[::-1])]
    stride = width + 2 * reach[1]
    start, phase, squares, beyond = [], [], [], []
    for length, other, radius in zip(size, size[::-1], reach, strict=True):
        remainder, group, nearest = _phases(length, grid_size, device)
        step = torch.arange(-radius - 1, radius + 2, device=device)
        square = (other // math.gcd(*size) * (2 * grid_size * step + remainder[:, None])).double().square()
        start.append(nearest + radius)
        phase.append(group)
        squares.append(square[:, 1:-1])
        beyond.append(torch.minimum(square[:, 0], square[:, -1]))
    distance = (squares[0][:, None, :, None] + squares[1][None, :, None, :]).flatten(2).flatten(0, 1)
    distance, order = distance.sort(dim=1, stable=True)
    nearer = distance < torch.minimum(beyond[0][:, None], beyond[1]).flatten()[:, None]
    count = nearer.sum(dim=1).min()
    rows, columns = order // (2 * reach[1] + 1) - reach[0], order % (2 * reach[1] + 1) - reach[1]
    unit = (math.gcd(*size) / (2 * height * width * grid_size)) ** 2
    return _Offsets(
        reach=tuple(reach),
        start=torch.stack([start[0] * stride, start[1]]),
        phase=torch.stack([phase[0] * len(squares[1]), phase[1]]),
        order=(rows * stride + columns)[:, :count].contiguous(),
        distance=(distance[:, :count] * unit).float(),
        unit=unit,
    )


def _phases(length, grid_size, device):
    """(distinct offsets [n] of nodes from the pixels that hold them, which one a node has [G], that pixel [G])."""
    node = torch.arange(grid_size, device=device)
    pixel = (2 * node + 1) * length // (2 * grid_size)
    offset = (2 * pixel + 1) * grid_size - (2 * node + 1) * length
    return *offset.unique(return_inverse=True), pixel


def _choose_search(device):
    if device.type == "cpu" and compiled.is_available():
        return _search_compiled
    if triton.is_available() and (device.type == "cuda" or INTERPRETED):
        return _search_triton
    return _search_torch


def _search_compiled(table, offsets, grid_size, k):
    batch, height, width = table.shape
    place = torch.empty(batch, grid_size**2, k, dtype=torch.int64, device=table.device)
    squared_distance = torch.empty(batch, grid_size**2, k, dtype=torch.float32, device=table.device)
    tensors = [
        (torch.int32, table.contiguous()),
        (torch.int64, offsets.start, offsets.phase, offsets.order, place),
        (torch.float32, offsets.distance, squared_distance),
    ]
    sizes = batch, height, width, grid_size, k, *offsets.order.shape, *offsets.reach
    compiled.run_at("nearest.nearest", tensors, *sizes, offsets.unit)
    return place, squared_distance


def _search_triton(table, offsets, grid_size, k):
    from models.backends import _triton_nearest  # here, because Triton may be missing

    batch, height, width = table.shape
    padded = _padded(table, offsets)
    place = torch.empty((batch, grid_size**2, k), dtype=torch.int64, device=table.device)
    squared_distance = torch.empty(place.shape, device=table.device)
    common = math.gcd(height, width)
    units = width // common, height // common, 2 * height * width * grid_size // common
    nodes = batch * grid_size**2
    tensors = padded, table.contiguous(), offsets.start, offsets.phase, offsets.order, offsets.distance
    sizes = nodes, padded.shape[1], height, width, offsets.order.shape[1]
    with torch.cuda.device_of(table):
        _triton_nearest.nearest[(-(-nodes // WARP),)](
            *tensors, place, squared_distance, *sizes, *units, grid_size, k, WARP, 8 * WARP, num_warps=1
        )
    return place, squared_distance


def _padded(table, offsets):
    rows, columns = offsets.reach
    return F.pad(table, (columns, columns, rows, rows), value=-1).flatten(1)


def _search_torch(table, offsets, grid_size, k):
    padded = _padded(table, offsets)
    start = (offsets.start[0][:, None] + offsets.start[1]).flatten()
    phase = (offsets.phase[0][:, None] + offsets.phase[1]).flatten()
    count = offsets.order.shape[1]
    number = torch.arange(count, dtype=torch.int32, device=table.device)
    places, distances = [], []
    for node in torch.arange(grid_size**2, device=table.device).split(max(CHUNK // (count * len(table)), 1)):
        present = padded[:, start[node, None] + offsets.order[phase[node]]]
        waiting = torch.where(present >= 0, number, count)
        first = []
        for _ in range(k):
            first.append(waiting.amin(dim=2, keepdim=True).long())
            waiting.scatter_(2, first[-1].clamp(max=count - 1), count)
        first = torch.cat(first, dim=2)  # count, where there are fewer than k
        places.append(F.pad(present, (0, 1), value=-1).gather(2, first))
        distances.append(F.pad(offsets.distance[phase[node]], (0, 1)).expand(len(table), -1, -1).gather(2, first))
    place, distance = torch.cat(places, dim=1).long(), torch.cat(distances, dim=1)

    pending = (place[:, :, -1] < 0).nonzero()  # here the host waits for the device: a few times in all, not per node
    if len(pending):
        points = (table >= 0).flatten(1).nonzero()[:, 1].view(len(table), -1)  # in raster order
        for part in pending.split(max(CHUNK // points.shape[1], 1)):
            image, node = part.unbind(1)
            pixel, distance[image, node] = _search_all(points[image], table.shape[1:], grid_size, k, node, offsets.unit)
            place[image, node] = table.flatten(1)[image[:, None], pixel].long()
    return place, distance


def _search_all(pixels, size, grid_size, k, node, unit):
    """Which k of pixels [N, L] are nearest to nodes [N]: (pixel [N, k], squared distance [N, k])."""
    height, width = size
    from_row = _squares(height, width // math.gcd(*size), grid_size, node // grid_size)
    from_column = _squares(width, height // math.gcd(*size), grid_size, node % grid_size)
    distance = from_row.gather(1, pixels // width) + from_column.gather(1, pixels % width)
    nearest = []
    for _ in range(k):  # min returns the first of equal values
        smallest, where = distance.min(dim=1, keepdim=True)
        nearest.append((pixels.gather(1, where), smallest))
        distance.scatter_(1, where, math.inf)
    pixel, distance = (torch.cat(parts, dim=1) for parts in zip(*nearest, strict=True))
    return pixel, (distance * unit).float()


def _squares(length, unit, grid_size, i):
    """Squared distances along one axis of all its pixels from nodes i [N], float64 [N, length]."""
    pixel = torch.arange(length, device=i.device)
    return (unit * ((2 * pixel + 1) * grid_size - (2 * i[:, None] + 1) * length)).double().square()
