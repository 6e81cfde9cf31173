"""The pixels of an image that are present: the geometry that every layer shares (docs/method.md, 1).

Pixel i of an axis of length R sits at its centre, (i + 0.5) / R.
"""

import functools

import numpy as np
import torch

from utils.rng import rand

KINDS = ("uniform", "halton", "stratified")


class Coordinates:
    """L distinct pixels in each image of a batch of H×W images.

    index   int64 [B, L], raster order row * W + column, distinct within an image, in any order
    size    (H, W)

    Layers derive lookup tables, neighbour counts and interpolation weights from the geometry. `cached` computes each on
    first use and keeps it here: once per batch, not once per block.
    """

    def __init__(self, index, size):
        height, width = size
        if index.dim() != 2 or index.dtype != torch.int64:
            raise ValueError(f"index must be int64 [B, L], got {index.dtype} {tuple(index.shape)}")
        ordered = index.sort(dim=1).values
        if index.numel() and (ordered[:, 0].min() < 0 or ordered[:, -1].max() >= height * width):
            raise ValueError(f"index must lie in [0, {height * width}) for a {height}x{width} image")
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("index holds a pixel twice in one image; pixels must be distinct")
        self._set(index, size, {}, raster=False)

    def _set(self, index, size, cache, raster):
        self.index = index
        self.size = tuple(size)
        self._cache = cache
        self._raster = raster  # all pixels in raster order: gather and scatter are reshapes

    @classmethod
    def _trusted(cls, index, size, cache=None, raster=False):
        """Skips the checks of __init__, which would synchronise with the GPU."""
        coords = cls.__new__(cls)
        coords._set(index, size, {} if cache is None else cache, raster)
        return coords

    @classmethod
    def full(cls, batch, size, device=None):
        """Every pixel, in raster order. Calls with the same arguments share one cached geometry."""
        return _full(batch, tuple(size), torch.device(device or "cpu"))

    @classmethod
    def random(cls, batch, size, num_points, kind="uniform", generator=None, device=None):
        """A random subset of `num_points` distinct pixels per image, in raster order, drawn on `device`.

        docs/method.md, 1.2.

        kind        uniform     without replacement
                    halton      a randomly shifted Halton sequence in bases 2 and 3, without repeated pixels
                    stratified  one pixel from each of num_points cells partitioning the image (shifted, jittered grid)
        generator   one torch.Generator, or a list of one per image (utils.rng.sample_generators)
        """
        pixels = size[0] * size[1]
        if not 1 <= num_points <= pixels:
            raise ValueError(f"num_points={num_points} is not between 1 and the {pixels} pixels of {size[0]}x{size[1]}")
        if kind == "uniform":
            index = _smallest(rand((batch, pixels), generator, device), num_points)
        elif kind == "halton":
            index = _smallest(_halton_order(batch, size, num_points, generator, device), num_points)
        elif kind == "stratified":
            index = _stratified(batch, size, num_points, generator, device)
        else:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
        return cls._trusted(index, size, raster=num_points == pixels)

    @property
    def batch(self):
        return self.index.shape[0]

    @property
    def num_points(self):
        return self.index.shape[1]

    @property
    def device(self):
        return self.index.device

    @property
    def image_size(self):
        """(H, W) of the image that positions refer to: `size`, or the whole image for a models.large_images.Window."""
        return self.size

    @property
    def is_full(self):
        """True if every pixel of the image is present, in any order."""
        return self.num_points == self.size[0] * self.size[1]

    @property
    def is_raster(self):
        """True if every pixel is present in raster order, so that [B, L, C] is an image in memory."""
        return self._raster

    def doubled(self):
        """The same pixels for a batch of twice as many images: this one, repeated."""
        return self.cached("doubled", lambda: Coordinates._trusted(self.index.repeat(2, 1), self.size,
                                                                   raster=self._raster))

    @property
    def positions(self):
        """Pixel centres, float32 [B, L, 2], (x, y) in [0, 1]."""
        return self.cached("positions", self._positions)

    def _positions(self):
        height, width = self.size
        x = (self.index % width + 0.5) / width
        y = (self.index // width + 0.5) / height
        return torch.stack([x, y], dim=-1)

    @property
    def table(self):
        """Lookup table int32 [B, H * W]: the position of each pixel in `index`, or -1 if it is absent."""
        return self.cached("table", self._table)

    def _table(self):
        table = torch.full((self.batch, self.size[0] * self.size[1]), -1, dtype=torch.int32, device=self.device)
        place = torch.arange(self.num_points, dtype=torch.int32, device=self.device)
        return table.scatter_(1, self.index, place.expand(self.batch, -1))

    def cached(self, key, make):
        """The value stored under `key`; `make()` computes it the first time."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def gather(self, image):
        """Values of an image [B, C, H, W] at the coordinates, [B, L, C]."""
        flat = image.flatten(2).transpose(1, 2)
        if self._raster:
            return flat
        return flat.gather(1, self.index[:, :, None].expand(-1, -1, flat.shape[2]))

    def scatter(self, values, fill=0.0):
        """Image [B, C, H, W] with `values` [B, L, C] at the coordinates and `fill` elsewhere (channels_last)."""
        height, width = self.size
        if not self._raster:
            canvas = values.new_full((self.batch, height * width, values.shape[2]), fill)
            values = canvas.scatter(1, self.index[:, :, None].expand_as(values), values)
        return values.unflatten(1, (height, width)).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _full(batch, size, device):
    index = torch.arange(size[0] * size[1], device=device).expand(batch, -1)
    return Coordinates._trusted(index, size, cache={}, raster=True)


def _smallest(score, count):
    """Columns of the `count` smallest scores of each row, in ascending order."""
    if score.device.type == "cpu":  # takes a third of the time of topk
        bound = torch.from_numpy(np.partition(score.numpy(), count - 1, axis=1)[:, count - 1, None])
        smallest = (score <= bound).nonzero()[:, 1]
        if len(smallest) == count * len(score):  # otherwise several scores equal a bound
            return smallest.view(len(score), count)
    return score.topk(count, dim=1, largest=False, sorted=False).indices.sort(dim=1).values


@functools.lru_cache(maxsize=8)
def _halton_points(count, device):
    """First `count` points of the Halton sequence in bases 2 (rows) and 3 (columns), float64 [count, 2]."""
    axes = []
    for base in (2, 3):
        rest = torch.arange(1, count + 1, device=device)
        value, weight = torch.zeros(count, dtype=torch.float64, device=device), 1.0
        for _ in range(count.bit_length()):
            weight /= base
            value += weight * (rest % base)
            rest = rest // base
        axes.append(value)
    return torch.stack(axes, dim=-1)


def _halton_order(batch, size, num_points, generator, device):
    """Time of the shifted sequence's first visit to each pixel, [B, H * W]; unvisited pixels come last, shuffled."""
    height, width = size
    length = 4 * num_points
    draws = rand((batch, 2 + height * width), generator, device)
    points = (_halton_points(length, draws.device) + draws[:, None, :2].double()) % 1.0
    row = (points[..., 0] * height).long().clamp_(max=height - 1)
    column = (points[..., 1] * width).long().clamp_(max=width - 1)
    visit = torch.arange(length, dtype=torch.float64, device=draws.device).expand(batch, -1)
    never = length + draws[:, 2:].double()
    return never.scatter_reduce(1, row * width + column, visit, "amin")


@functools.lru_cache(maxsize=8)
def _cells(size, num_points, device):
    """Partition of an image into cells: ((top, bottom, left, right), each int64 [num_points]; True if areas are equal).

    The image is cut into bands of rows, and each band into its share of the cells. The number of bands makes the cells
    nearly square.
    """
    height, width = size
    bands = round((num_points * height / width) ** 0.5)
    bands = min(max(bands, -(-num_points // width)), height, num_points)
    bounds = []
    for band in range(bands):
        top, bottom = band * height // bands, (band + 1) * height // bands
        cells = (band + 1) * num_points // bands - band * num_points // bands
        bounds += [(top, bottom, c * width // cells, (c + 1) * width // cells) for c in range(cells)]
    areas = {(bottom - top) * (right - left) for top, bottom, left, right in bounds}
    return torch.tensor(bounds, device=device).unbind(1), len(areas) == 1


def _stratified(batch, size, num_points, generator, device):
    """One pixel from each cell, int64 [B, num_points].

    Cells of unequal area are shifted together, cyclically, by a random number of pixels. Otherwise the pixels of small
    cells would be drawn up to 4 times as often as others.
    """
    draws = rand((batch, 2, num_points + 1), generator, device)
    draws, shift = draws[..., :-1], draws[..., -1:]
    (top, bottom, left, right), alike = _cells(size, num_points, draws.device)
    # in float32 the product can round up to the side of the cell
    row = torch.minimum(top + (draws[:, 0] * (bottom - top)).long(), bottom - 1)
    column = torch.minimum(left + (draws[:, 1] * (right - left)).long(), right - 1)
    if not alike:
        row = (row + (shift[:, 0] * size[0]).long()) % size[0]
        column = (column + (shift[:, 1] * size[1]).long()) % size[1]
    return (row * size[1] + column).sort(dim=1).values
