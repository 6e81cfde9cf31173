"""The networks on images too large for memory: layers at points take one part after another, the grid U-Net runs once.

The sparse operator sees half a kernel around each point, so a block is right at a window if it is given the points of
that window and of a halo of half a kernel around it, as far as the image goes; the rest of what it returns is dropped.
Two levels of parts follow from that.

    bands   A block takes at most max_points points at a time, halo included: what it holds while it works is bounded.
    tiles   Between blocks features are kept, num_blocks + 1 for each point of a tile and of the halo of all blocks yet
            to come. A block holds about KEPT times as much for each of its points, so a tile with its halo may have
            KEPT * max_points of them, and both take as much memory. Tiles compute the blocks before the grid twice: for
            the grid, and again when they read it. Where halos would make all that four times the work or more, the
            image is one tile, and num_blocks + 1 features of all its points are kept.

All results equal those of the whole image within rounding.
"""

import functools
from typing import NamedTuple

import torch

from data.coordinates import Coordinates
from data.window import Window
from models.interpolation import grid_to_points, knn_mixture
from models.sparse_block import resize_kernel
from utils.errors import UserError

KEPT = 3


class Context(NamedTuple):
    """What the points of an image have in common.

    grid        [B, base, G, G], of the grid U-Net: all that a point knows of those far from it
    outputs     [(x [B, L, nf], its window), ...] of the blocks before the grid at the whole image, or None: not kept
    """

    grid: torch.Tensor
    outputs: list | None


def decoder_in_parts(decoder, values, t, z, coords, max_points=None):
    """SparseUNet.forward at every pixel, values [B, H * W, C] in raster order, in parts of at most max_points points.

    coords is Coordinates.full; max_points None: all at once. Raises UserError where that is too few for the kernels.
    """
    if max_points is None or coords.index.numel() <= max_points:
        return decoder(values, t, z, coords)
    image = Window.whole(coords.batch, coords.size, coords.device)
    context = decoder_context(decoder, values, t, z, image, max_points)
    return read_back(decoder, context, values, image, image, t, z, max_points)


def encoder_in_parts(encoder, values, coords, max_points=None):
    """SparseEncoder.forward at every pixel, as decoder_in_parts."""
    if max_points is None or coords.index.numel() <= max_points:
        return encoder(values, coords)
    image = Window.whole(coords.batch, coords.size, coords.device)
    grid, _ = _points_to_grid(encoder.points_to_grid, values, image, max_points)
    return encoder.from_grid(grid, values.dtype)


def decoder_context(decoder, values, t, z, image, max_points):
    """Context of the points of a SparseUNet: values [B, H * W, C] at `image`, the window that is the whole image."""
    modulation = decoder.conditioning(decoder.time(t), z)
    grid, outputs = _points_to_grid(decoder.points_to_grid, values, image, max_points, modulation)
    return Context(decoder.grid_unet(grid, modulation), outputs)


def read_back(decoder, context, values, source, target, t, z, max_points):
    """The prediction of a SparseUNet at the window `target`, [B, l, out_channels], of the dtype of values.

    context     of decoder_context, at this t; its outputs are used up
    values      [B, L, C] at the window `source`, which holds `target` grown by `reach`
    """
    modulation = decoder.conditioning(decoder.time(t), z)
    # linear_back before interpolating, not after, where there are more points than nodes: the same but for rounding
    grid = decoder.linear_back(context.grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    out = values.new_empty(target.batch, target.num_points, decoder.linear_out.out_features)
    before, after = decoder.points_to_grid.blocks, decoder.blocks
    halo = _halo(before, target.image_size)
    for tile in _tiles(target, halo, len(before) + len(after), max_points):
        first, *windows = _windows(tile, halo, len(after))
        outputs = context.outputs or list(
            _outputs(decoder.points_to_grid, values, source, first, halo, modulation, max_points))
        features = functools.partial(grid_to_points, grid)
        for merge, block, window in zip(decoder.merges, after, windows, strict=True):
            merged = _merged(merge, features, _reader(*outputs.pop()))
            features = _reader(_in_bands(block, merged, window, halo, modulation, max_points), window)
        tile.put(decoder.linear_out(features(tile)).to(values.dtype), target, out)
    return out


def reach(decoder, image_size):
    """(rows, columns) around a point that the layers at points see: half a kernel for each block."""
    blocks = decoder.points_to_grid.blocks
    return tuple((len(blocks) + len(decoder.blocks)) * half for half in _halo(blocks, image_size))


def check_max_points(network, image_size, max_points):
    """UserError where max_points is too few for one image of this size; network: SparseUNet or SparseEncoder."""
    _bands(Window.whole(1, image_size), _halo(network.points_to_grid.blocks, image_size), max_points)


def _points_to_grid(module, values, image, max_points, modulation=None):
    """PointsToGrid.forward: (grid, outputs of the blocks where the image is one tile, else None)."""
    full = Coordinates.full(1, image.size, image.device)  # one geometry for all images
    nearest = knn_mixture(full, module.resolution, module.neighbours)
    place, weight = nearest.place.flatten(), nearest.weight.flatten()
    node = torch.arange(module.resolution**2, device=place.device).repeat_interleave(module.neighbours)
    row, column = place // image.size[1], place % image.size[1]
    grid = values.new_zeros(image.batch, module.resolution**2, module.linear_out.out_features)
    halo = _halo(module.blocks, image.size)
    tiles = _tiles(image, halo, len(module.blocks), max_points)
    for tile in tiles:
        outputs = list(_outputs(module, values, image, tile, halo, modulation, max_points))
        x, _ = outputs[-1]
        (top, bottom), (left, right) = tile.rows, tile.columns
        here = ((row >= top) & (row < bottom) & (column >= left) & (column < right)).nonzero()[:, 0]
        there = (row[here] - top) * tile.size[1] + column[here] - left
        taken = module.linear_out(x[:, there]) * weight[here, None]
        grid.index_add_(1, node[here], taken.to(grid.dtype))
    grid = grid.unflatten(1, (module.resolution, module.resolution)).permute(0, 3, 1, 2)
    return grid, outputs if len(tiles) == 1 else None


def _outputs(module, values, source, target, halo, modulation, max_points):
    """Yield (output, the window it is at) of every block of a PointsToGrid; the last window is `target`."""
    features = _linear(module.linear_in, _reader(values, source))
    for block, window in zip(module.blocks, _windows(target, halo, len(module.blocks))[1:], strict=True):
        x = _in_bands(block, features, window, halo, modulation, max_points)
        features = _reader(x, window)
        yield x, window


def _in_bands(block, features, window, halo, modulation, max_points):
    """A SparseBlock at a window, band by band; features: any window -> what the block is given there."""
    out = None
    for band in _bands(window, halo, max_points):
        outer = band.grown(halo)
        x = block(features(outer), outer, modulation)
        if out is None:
            out = x.new_empty(window.batch, window.num_points, x.shape[2])
        band.put(band.take(x, outer), window, out)
    return out


def _bands(window, halo, max_points):
    bands = window.split(halo, max_points // window.batch)
    if bands is None:
        taps = [2 * half + 1 for half in halo]
        height, width = window.image_size
        raise UserError(f"--max_points={max_points} is too few for an image of {height}x{width}, with kernels of "
                        f"{taps[0]}x{taps[1]} pixels; allow at least {2 * window.batch * taps[0] * taps[1]}")
    return bands


def _reader(values, source):
    """window -> values [B, l, C] at it, from those at `source`."""
    return lambda window: window.take(values, source)


def _linear(layer, features):
    return lambda window: layer(features(window))


def _merged(merge, features, skip):
    return lambda window: merge(features(window), skip(window))


def _halo(blocks, image_size):
    """(rows, columns) of half a kernel, the same for all blocks."""
    return tuple(length // 2 for length in resize_kernel(blocks[0].kernel, image_size, blocks[0].train_size).shape[:2])


def _tiles(target, halo, blocks, max_points):
    reach = tuple(blocks * half for half in halo)
    return target.split(reach, KEPT * max_points // target.batch, most_work=4) or [target]


def _windows(target, halo, count):
    """Where the input and the outputs of `count` blocks are needed, for the last output at `target`."""
    return [target.grown(tuple(more * half for half in halo)) for more in range(count, -1, -1)]
