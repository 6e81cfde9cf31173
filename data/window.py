"""A rectangle of an image, seen on its own: the geometry of layers that run on one part of a large image at a time."""

import torch

from data.coordinates import Coordinates


class Window(Coordinates):
    """Every pixel of a rectangle of an H×W image, in raster order.

    image_size      (H, W) of the image
    rows, columns   (first, end) of the rectangle

    `size` is that of the rectangle, and `index`, `table`, `gather` and `scatter` are those of an image of that size;
    `positions` are the places of its pixels in the whole image.
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
        """The window that is the image."""
        return cls(batch, image_size, (0, image_size[0]), (0, image_size[1]), device)

    @property
    def image_size(self):
        return self._image_size

    def _positions(self):
        x, y = ((torch.arange(first, end, device=self.device) + 0.5) / length
                for (first, end), length in ((self.columns, self.image_size[1]), (self.rows, self.image_size[0])))
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        return grid.flatten(0, 1).expand(self.batch, -1, -1)

    def grown(self, halo):
        """This window with halo = (rows, columns) more pixels on each side, as far as the image goes."""
        rows, columns = ((max(first - more, 0), min(end + more, length)) for (first, end), more, length in
                         zip((self.rows, self.columns), halo, self.image_size, strict=True))
        return Window(self.batch, self.image_size, rows, columns, self.device)

    def within(self, other):
        """Slices of the rows and columns of `other`, a window that holds this one, at which this one lies."""
        return tuple(slice(first - start, end - start) for (first, end), (start, _) in
                     ((self.rows, other.rows), (self.columns, other.columns)))

    def take(self, values, source):
        """values [B, L, C] at `source`, a window that holds this one -> those at this window, [B, l, C]."""
        rows, columns = self.within(source)
        return values.unflatten(1, source.size)[:, rows, columns].flatten(1, 2)

    def put(self, values, target, out):
        """Write values [B, l, C] at this window into `out` [B, L, C] at `target`, a window that holds this one."""
        rows, columns = self.within(target)
        out.unflatten(1, target.size)[:, rows, columns] = values.unflatten(1, self.size)

    def split(self, halo, most, most_work=16):
        """Windows that partition this one, each of which has at most `most` pixels when grown by the halo.

        Of the partitions into equal rows and columns of windows, the one that has the fewest grown pixels in all; None
        where those would be more than `most_work` times the pixels of this window.
        """
        (height, width), best = self.size, None
        for across in range(1, width + 1):
            columns = -(-width // across)
            room = most // self._grown_length(columns, 1, halo)
            rows = height if room >= self._grown_length(height, 0, halo) else room - 2 * halo[0]
            if rows < 1:
                continue
            down = -(-height // rows)
            cost = (height + 2 * halo[0] * (down - 1)) * (width + 2 * halo[1] * (across - 1))
            if best is None or cost < best[0]:
                best = cost, down, across
        if best is None or best[0] > most_work * height * width:
            return None
        rows, columns = (_parts(span, count) for span, count in ((self.rows, best[1]), (self.columns, best[2])))
        return [Window(self.batch, self.image_size, r, c, self.device) for r in rows for c in columns]

    def _grown_length(self, length, axis, halo):
        return min(length + 2 * halo[axis], self.image_size[axis])


def _parts(span, count):
    first, length = span[0], span[1] - span[0]
    return [(first + i * length // count, first + (i + 1) * length // count) for i in range(count)]
