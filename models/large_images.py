"""Large images: a sparse block processes one window of the image after another.

A block sees half a kernel around each point. So its output on a window is exact if its input also covers a halo of half
a kernel around the window; the output on the halo is dropped. Features of all points are kept between blocks, and
max_points bounds the memory that a block needs in addition (docs/method.md, 4.10).
"""

import torch

from data.coordinates import Coordinates
from models.blocks import run_block
from utils.errors import UserError

MOST_WORK = 16  # largest ratio of the points of all parts, halos included, to those of the image


def in_parts(block, x, coords, modulation, max_points):
    """block(x, coords, modulation), with at most max_points points of all images together at a time; None: no limit.

    block  SparseBlock, or a module with the same forward and `halo`
    Only full images and Windows are split; other sets of points are processed at once.
    """
    if max_points is None or coords.index.numel() <= max_points or not coords.is_raster:
        return run_block(block, x, coords, modulation)
    window = coords if isinstance(coords, Window) else Window.whole(coords.batch, coords.size, coords.device)
    halo, out = block.halo(coords.image_size), None
    for part in window.split(halo, max_points // coords.batch):
        outer = part.grown(halo, window)
        y = run_block(block, outer.take(x, window), outer, modulation)
        out = y.new_empty(*x.shape[:2], y.shape[2]) if out is None else out
        part.put(part.take(y, outer), window, out)
    return out


def check_max_points(network, image_size, max_points):
    """Raise UserError if max_points is too few for an image of size (H, W); network: SparseUNet or SparseEncoder."""
    if max_points < image_size[0] * image_size[1]:
        Window.whole(1, image_size).split(network.points_to_grid.blocks[0].halo(image_size), max_points)


class Window(Coordinates):
    """Every pixel of a rectangle of an H×W image, in raster order.

    image_size      (H, W) of the image
    rows, columns   (first, end) of the rectangle

    `size`, `index`, `table`, `gather` and `scatter` treat the rectangle as an image. `positions` are those of its
    pixels in the whole image.
    """

    def __init__(self, batch, image_size, rows, columns, device=None):
        for (first, end), length in zip((rows, columns), image_size, strict=True):
            if not 0 <= first < end <= length:
                raise ValueError(f"a window of {rows}, {columns} does not lie in an image of {tuple(image_size)}")
        size = rows[1] - rows[0], columns[1] - columns[0]
        self._set(torch.arange(size[0] * size[1], device=device).expand(batch, -1), size, {}, raster=True)
        self.rows, self.columns = tuple(rows), tuple(columns)
        self._image_size = tuple(image_size)

    @classmethod
    def whole(cls, batch, image_size, device=None):
        """The window that covers the image."""
        return cls(batch, image_size, (0, image_size[0]), (0, image_size[1]), device)

    @property
    def image_size(self):
        return self._image_size

    def doubled(self):
        """As for Coordinates."""
        return self.cached("doubled", lambda: Window(2 * self.batch, self.image_size, self.rows, self.columns,
                                                     self.device))

    def _positions(self):
        x, y = ((torch.arange(first, end, device=self.device) + 0.5) / length
                for (first, end), length in ((self.columns, self.image_size[1]), (self.rows, self.image_size[0])))
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        return grid.flatten(0, 1).expand(self.batch, -1, -1)

    def grown(self, halo, within=None):
        """This window, larger by halo = (rows, columns) pixels on each side, clipped to the window `within` (by default
        to the image)."""
        spans = (within.rows, within.columns) if within else ((0, length) for length in self.image_size)
        rows, columns = ((max(first - more, start), min(end + more, stop)) for (first, end), more, (start, stop) in
                         zip((self.rows, self.columns), halo, spans, strict=True))
        return Window(self.batch, self.image_size, rows, columns, self.device)

    def within(self, other):
        """Slices of rows and columns that select this window from `other`, a window that contains it."""
        return tuple(slice(first - start, end - start) for (first, end), (start, _) in
                     ((self.rows, other.rows), (self.columns, other.columns)))

    def take(self, values, source):
        """Select from values [B, L, C] at `source`, a window that contains this one: [B, l, C]."""
        rows, columns = self.within(source)
        return values.unflatten(1, source.size)[:, rows, columns].flatten(1, 2)

    def put(self, values, target, out):
        """Write values [B, l, C] at this window into `out` [B, L, C] at `target`, a window that contains this one."""
        rows, columns = self.within(target)
        out.unflatten(1, target.size)[:, rows, columns] = values.unflatten(1, self.size)

    def split(self, halo, most):
        """Partition into windows that have at most `most` pixels each, halo included.

        Choose the grid of equal windows with the fewest pixels, halos included. Raises UserError if they are more than
        MOST_WORK times the pixels of this window.
        """
        (height, width), best = self.size, None
        for across in range(1, width + 1):
            columns = min(-(-width // across) + 2 * halo[1], width)
            rows = height if columns * height <= most else most // columns - 2 * halo[0]
            if rows < 1:
                continue
            down = -(-height // rows)
            cost = (height + 2 * halo[0] * (down - 1)) * (width + 2 * halo[1] * (across - 1))
            if best is None or cost < best[0]:
                best = cost, down, across
        if best is None or best[0] > MOST_WORK * height * width:
            taps = [2 * half + 1 for half in halo]
            raise UserError(f"--max_points={most * self.batch} is too few for an image of {self.image_size[0]}x"
                            f"{self.image_size[1]} with kernels of {taps[0]}x{taps[1]} pixels; allow at least "
                            f"{2 * self.batch * taps[0] * taps[1]}")
        rows, columns = (_parts(span, count) for span, count in ((self.rows, best[1]), (self.columns, best[2])))
        return [Window(self.batch, self.image_size, r, c, self.device) for r in rows for c in columns]


def _parts(span, count):
    first, length = span[0], span[1] - span[0]
    return [(first + i * length // count, first + (i + 1) * length // count) for i in range(count)]
