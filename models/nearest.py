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


def nearest_pixels(coords, grid_size, k):
    """The k present pixels nearest to every node ((i + 0.5) / G, (j + 0.5) / G), G = grid_size, measured in [0, 1]².

    Returns (place int64 [B, G * G, k], squared_distance float32 [B, G * G, k]) in ascending order of distance, and of
    raster index where distances are equal. `place` is the place in coords.index. Nodes are in raster order.
    Raises ValueError where an image has fewer than k pixels.
    """
    num_points, table = coords.num_points, coords.table
    if not 1 <= k <= num_points:
        raise ValueError(f"k={k} nearest pixels do not exist; each image has {num_points}")
    if coords.is_raster:
        table = table[:1]  # full images have one geometry
    offsets = _offsets(coords.size, grid_size, num_points, k, table.device)
    place, squared_distance = _choose_search(table)(table, offsets)
    if coords.is_raster:
        return place.expand(coords.batch, -1, -1), squared_distance.expand(coords.batch, -1, -1)
    return place, squared_distance


@dataclass(frozen=True)
class _Offsets:
    """Which pixels to look at around a node, nearest first, in images that are arranged by _padded.

    The first of pixels start[i] + j // groups + order[first[i] + j % groups] that is present is the one nearest to node
    (i, j), the second one is the second nearest, and so on: ties are in raster order, and no pixel that is not listed
    is as near as the last that is. Nodes that lie alike in the pixel that holds them share a list. Of one row of nodes
    these are every `groups`-th, and as their pixels are `step` columns apart, those columns lie side by side.

    size ...    (H, W), G and k of the search
    reach       rows and columns that are added on each side of the image
    step        columns between the pixels of nodes that share a list; groups is how many lists a row of nodes needs
    apart       how far apart in a padded image a column and the next one are; step · apart is the length of a row
    start       int64 [G], first int64 [G]
    order       int64 [lists, n]
    distance    float32 [lists, n], squared distances in [0, 1]²
    unit        squared distance in [0, 1]² of which the integers of the search are multiples
    """

    size: tuple
    grid_size: int
    k: int
    reach: tuple
    step: int
    apart: int
    groups: int
    start: torch.Tensor
    first: torch.Tensor
    order: torch.Tensor
    distance: torch.Tensor
    unit: float

    @functools.cached_property
    def arguments(self):
        """All of these in the order in which the compiled search takes them."""
        tensors = (torch.int64, self.start, self.first, self.order), (torch.float32, self.distance)
        layout = *self.reach, self.step, self.apart, self.groups
        numbers = *self.size, self.grid_size, self.k, *self.order.shape, *layout, self.unit
        return *compiled.addresses(tensors), *numbers


@functools.lru_cache(maxsize=16)
def _offsets(size, grid_size, num_points, k, device):
    height, width = size
    lists = [grid_size // math.gcd(grid_size, length) for length in size]
    area = min(MEAN_POINTS * k * height * width / num_points, LONGEST_LIST, MAX_OFFSETS / math.prod(lists))
    reach = [max(math.ceil(math.sqrt(area / math.pi * length / other)), 1) for length, other in (size, size[::-1])]
    squares, beyond = [], []
    for length, other, radius, phases in zip(size, size[::-1], reach, lists, strict=True):
        node = torch.arange(phases, device=device)
        remainder = (2 * _holding(node, length, grid_size) + 1) * grid_size - (2 * node + 1) * length
        away = torch.arange(-radius - 1, radius + 2, device=device)
        square = (other // math.gcd(*size) * (2 * grid_size * away + remainder[:, None])).double().square()
        squares.append(square[:, 1:-1])
        beyond.append(torch.minimum(square[:, 0], square[:, -1]))
    distance = (squares[0][:, None, :, None] + squares[1][None, :, None, :]).flatten(2).flatten(0, 1)
    distance, order = distance.sort(dim=1, stable=True)
    nearer = distance < torch.minimum(beyond[0][:, None], beyond[1]).flatten()[:, None]
    count = nearer.sum(dim=1).min()
    order, distance = order[:, :count], distance[:, :count]

    step, node = lists[1] * width // grid_size, torch.arange(grid_size, device=device)
    rows, columns = order // (2 * reach[1] + 1) - reach[0], order % (2 * reach[1] + 1)  # from the added ones on
    columns += _holding(node[: lists[1]], width, grid_size).repeat(lists[0])[:, None]
    apart = -(-(width + 2 * reach[1]) // step)
    unit = (math.gcd(*size) / (2 * height * width * grid_size)) ** 2
    return _Offsets(
        size=size,
        grid_size=grid_size,
        k=k,
        reach=tuple(reach),
        step=step,
        apart=apart,
        groups=lists[1],
        start=(_holding(node, height, grid_size) + reach[0]) * step * apart,
        first=node % lists[0] * lists[1],
        order=rows * step * apart + columns % step * apart + columns // step,
        distance=(distance * unit).float(),
        unit=unit,
    )


def _holding(node, length, grid_size):
    """The pixels of an axis that hold these nodes; two of them may share one, and one between two goes to the later."""
    return (2 * node + 1) * length // (2 * grid_size)


def _choose_search(table):
    if table.is_cpu and compiled.is_available():
        return _search_compiled
    if triton.is_available() and (table.is_cuda or INTERPRETED):
        return _search_triton
    return _search_torch


def _search_compiled(table, offsets):
    shape = len(table), offsets.grid_size**2, offsets.k
    place = torch.empty(*shape, dtype=torch.int64, device=table.device)  # a tuple of sizes takes 0.5 us longer
    squared_distance = torch.empty(*shape, device=table.device)
    results = place.data_ptr(), squared_distance.data_ptr()  # new tensors, of which nothing has to be checked
    compiled.run_at("nearest.nearest", ((torch.int32, table.contiguous()),), *results, len(table), *offsets.arguments)
    return place, squared_distance


def _search_triton(table, offsets):
    from models.backends import _triton_nearest  # here, because Triton may be missing

    batch, (height, width), grid_size, k = len(table), offsets.size, offsets.grid_size, offsets.k
    padded = _padded(table, offsets)
    place = torch.empty((batch, grid_size**2, k), dtype=torch.int64, device=table.device)
    squared_distance = torch.empty(place.shape, device=table.device)
    common = math.gcd(height, width)
    units = width // common, height // common, 2 * height * width * grid_size // common
    nodes = batch * grid_size**2
    tensors = padded, table.contiguous(), offsets.start, offsets.first, offsets.order, offsets.distance
    sizes = nodes, padded.shape[1], height, width, offsets.order.shape[1], offsets.groups
    with torch.cuda.device_of(table):
        _triton_nearest.nearest[(-(-nodes // WARP),)](
            *tensors, place, squared_distance, *sizes, *units, grid_size, k, WARP, 8 * WARP, num_warps=1
        )
    return place, squared_distance


def _padded(table, offsets):
    """The table with absent pixels around each image, and columns `step` apart side by side: int32 [B, padded size]."""
    (height, width), (rows, columns) = offsets.size, offsets.reach
    right = offsets.step * offsets.apart - width - columns
    padded = F.pad(table.view(-1, height, width), (columns, right, rows, rows), value=-1)
    return padded.unflatten(2, (offsets.apart, offsets.step)).transpose(2, 3).flatten(1)


def _search_torch(table, offsets):
    grid_size, k = offsets.grid_size, offsets.k
    padded = _padded(table, offsets)
    column = torch.arange(grid_size, device=table.device)
    start = (offsets.start[:, None] + column // offsets.groups).flatten()
    listed = (offsets.first[:, None] + column % offsets.groups).flatten()
    count = offsets.order.shape[1]
    number = torch.arange(count, dtype=torch.int32, device=table.device)
    places, distances = [], []
    for node in torch.arange(grid_size**2, device=table.device).split(max(CHUNK // ((count + 1) * len(table)), 1)):
        present = padded[:, start[node, None] + offsets.order[listed[node]]]
        waiting = F.pad(torch.where(present >= 0, number, count), (0, 1), value=count)  # lists may be empty
        first = []
        for _ in range(k):
            first.append(waiting.amin(dim=2, keepdim=True).long())
            waiting.scatter_(2, first[-1], count)
        first = torch.cat(first, dim=2)  # count, where there are fewer than k
        places.append(F.pad(present, (0, 1), value=-1).gather(2, first))
        distances.append(F.pad(offsets.distance[listed[node]], (0, 1)).expand(len(table), -1, -1).gather(2, first))
    place, distance = torch.cat(places, dim=1).long(), torch.cat(distances, dim=1)

    pending = (place[:, :, -1] < 0).nonzero()  # here the host waits for the device: a few times in all, not per node
    if len(pending):
        points = (table >= 0).nonzero()[:, 1].view(len(table), -1)  # in raster order
        for part in pending.split(max(CHUNK // points.shape[1], 1)):
            image, node = part.unbind(1)
            pixel, distance[image, node] = _search_all(points[image], node, offsets)
            place[image, node] = table[image[:, None], pixel].long()
    return place, distance


def _search_all(pixels, node, offsets):
    """Which k of pixels [N, L] are nearest to nodes [N]: (pixel [N, k], squared distance [N, k])."""
    (height, width), grid_size = offsets.size, offsets.grid_size
    common = math.gcd(height, width)
    from_row = _squares(height, width // common, grid_size, node // grid_size)
    from_column = _squares(width, height // common, grid_size, node % grid_size)
    distance = from_row.gather(1, pixels // width) + from_column.gather(1, pixels % width)
    nearest = []
    for _ in range(offsets.k):  # min returns the first of equal values
        smallest, where = distance.min(dim=1, keepdim=True)
        nearest.append((pixels.gather(1, where), smallest))
        distance.scatter_(1, where, math.inf)
    pixel, distance = (torch.cat(parts, dim=1) for parts in zip(*nearest, strict=True))
    return pixel, (distance * offsets.unit).float()


def _squares(length, unit, grid_size, i):
    """Squared distances along one axis of all its pixels from nodes i [N], float64 [N, length]."""
    pixel = torch.arange(length, device=i.device)
    return (unit * ((2 * pixel + 1) * grid_size - (2 * i[:, None] + 1) * length)).double().square()
