"""Between the sampled points and the regular grid of the U-Net, in both directions.

Node (i, j) of a G×G grid sits at ((j + 0.5) / G, (i + 0.5) / G), and pixels sit at their centres (docs/method.md, 1.1).
"""

import math

import torch
import torch.nn.functional as F

from data.coordinates import Coordinates
from models.kernels import AUTO, BACKENDS, obstacle

TINY = 1e-20  # keeps the weight of a pixel that coincides with a node finite; other neighbours are > 1e-10 away
TIES = 7  # pixels beyond the k-th that can be exactly as far: up to k = 32, circles hold at most 8 pixels
CHUNK = 2**24  # distances that the search in plain PyTorch holds at a time


def knn_to_grid(features, coords, grid_size, k=3, backend="auto"):
    """Inverse-squared-distance weighted mean of the k points nearest to each grid node (docs/method.md, 4.3).

    features [B, L, C] -> [B, C, G, G] in channels_last memory, G = grid_size. Distances are measured in [0, 1]². Points
    exactly as far as the k-th all take part, so that no direction is preferred. A point that coincides with a node
    takes all of its weight. Raises ValueError if there are fewer than k points.
    """
    place, weight = coords.cached(("knn_to_grid", grid_size, k), lambda: _knn_weights(coords, grid_size, k, backend))
    rows = F.embedding_bag(place, features.flatten(0, 1), mode="sum", per_sample_weights=weight.to(features.dtype))
    return rows.view(coords.batch, grid_size, grid_size, -1).permute(0, 3, 1, 2)


def grid_to_points(grid, coords):
    """Bilinear interpolation of a square grid at the coordinates, clamped at the border (docs/method.md, 4.5).

    grid [B, C, G, G] -> [B, L, C], in the dtype of the grid.
    """
    positions = (2 * coords.positions - 1)[:, None].to(torch.promote_types(grid.dtype, torch.float32))
    wide = grid.to(positions.dtype)  # positions need more digits than half precision has
    points = F.grid_sample(wide, positions, mode="bilinear", padding_mode="border", align_corners=False)
    return points[:, :, 0].transpose(1, 2).to(grid.dtype)


def nearest_pixels(coords, grid_size, k, backend="auto"):
    """The k present pixels nearest to every grid node, and all pixels exactly as far as the k-th.

    Returns (place int64 [B, G², slots], squared_distance float32, likewise), slots = min(k + TIES, L), in ascending
    order of distance in [0, 1]², then of raster index. Free slots have place 0 and an infinite distance. `place`
    indexes coords.index, and nodes are in raster order. Raises ValueError if an image has fewer than k pixels.
    """
    if not 1 <= k <= coords.num_points:
        raise ValueError(f"k={k} nearest points were asked for, but there are only {coords.num_points} points")
    if coords.size != coords.image_size:
        raise ValueError("a window does not hold the pixels around all nodes; give it the grid of the whole image")
    one = Coordinates.full(1, coords.size, coords.device) if coords.is_raster else coords  # they share one geometry
    found = _choose(backend, coords.device)(one, grid_size, k, min(k + TIES, coords.num_points))
    return tuple(part.expand(coords.batch, -1, -1) for part in found)


def search_nearest_pixels(coords, grid_size, k, slots):
    """nearest_pixels in plain PyTorch: all distances from nodes to pixels, for some nodes at a time.

    The offset along the axis of rows is ((2 row + 1) G - (2 i + 1) H) / (2 H G). With g = gcd(H, W), squared distances
    are integers in units of (g / (2 H W G))², which float64 holds exactly up to 2^53, so that equal ones compare equal.
    """
    (height, width), common = coords.size, math.gcd(*coords.size)
    pixels = coords.index.sort(dim=1)
    rows = _squared_offsets(height, width // common, grid_size, coords.device)
    columns = _squared_offsets(width, height // common, grid_size, coords.device)
    unit = (common / (2 * height * width * grid_size)) ** 2
    places, distances = [], []
    nodes = torch.arange(grid_size**2, device=coords.device)
    for node in nodes.split(max(CHUNK // coords.index.numel(), 1)):
        distance = rows[node // grid_size][:, pixels.values // width]
        distance = distance + columns[node % grid_size][:, pixels.values % width]  # [nodes, B, L]
        order = distance.topk(slots, largest=False).indices.sort().values  # back in raster order
        distance, by_distance = distance.gather(2, order).sort(stable=True)
        order = order.gather(2, by_distance).transpose(0, 1)  # [B, nodes, slots]
        distance = distance.transpose(0, 1)
        taken = distance <= distance[..., k - 1 : k]
        places.append(pixels.indices.gather(1, order.flatten(1)).view(order.shape).where(taken, 0))
        distances.append((distance * unit).float().where(taken, torch.inf))
    return torch.cat(places, dim=1), torch.cat(distances, dim=1)


def _knn_weights(coords, grid_size, k, backend):
    """What F.embedding_bag takes: rows of the flattened batch int64 [B · G², slots], and their weights float32."""
    place, squared_distance = nearest_pixels(coords, grid_size, k, backend)
    weight = 1 / squared_distance.clamp(min=TINY)
    first = coords.num_points * torch.arange(coords.batch, device=place.device)
    return (place + first[:, None, None]).flatten(0, 1), (weight / weight.sum(-1, keepdim=True)).flatten(0, 1)


def _squared_offsets(length, unit, grid_size, device):
    """Squared offsets of all pixels from all nodes of an axis, float64 [G, length]."""
    pixel, node = torch.arange(length, device=device), torch.arange(grid_size, device=device)
    return (unit * ((2 * pixel + 1) * grid_size - (2 * node[:, None] + 1) * length)).double().square()


def _choose(backend, device):
    """The search that a backend uses on a device; those without one use that of `auto`."""
    if backend == "torch_dense":
        return search_nearest_pixels
    return next((BACKENDS[name].nearest_pixels for name in AUTO if not obstacle(name, device, depthwise=True)),
                search_nearest_pixels)
