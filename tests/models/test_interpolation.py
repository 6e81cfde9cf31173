"""Nearest pixels with ties, and both interpolations, against exact arithmetic and their symmetries."""

import numpy as np
import pytest
import torch

from data.coordinates import Coordinates
from models import interpolation
from models.interpolation import TIES, grid_to_points, knn_to_grid, nearest_pixels
from models.sparse_conv import available_backends
from tests.reference import interpolation as reference

SIZES = [(8, 8), (7, 9), (12, 5), (1, 6), (40, 1)]
SEARCHES = ["torch_dense", *(["numba"] if "numba" in available_backends() else [])]
# Image and grid: even, odd and equal ratios, and an image that is not square; then fractional ratios
WHOLE_RATIOS = [((16, 16), 8), ((32, 32), 8), ((24, 24), 8), ((8, 8), 8), ((16, 32), 8)]
RATIOS = [*WHOLE_RATIOS, ((20, 20), 8), ((8, 8), 16)]


def draw(size, share, batch=2, channels=3):
    """(features, coords), the points in an order of their own in each image."""
    generator = torch.Generator().manual_seed(size[0])
    order = torch.rand(batch, size[0] * size[1], generator=generator).argsort(dim=1)
    coords = Coordinates(order[:, : max(3, int(share * size[0] * size[1]))], size)
    return torch.randn(batch, coords.num_points, channels, generator=generator), coords


def check_nearest(coords, grid_size, k, backend):
    place, squared_distance = nearest_pixels(coords, grid_size, k, backend)
    assert place.dtype == torch.int64 and squared_distance.dtype == torch.float32
    assert place.shape == squared_distance.shape == (coords.batch, grid_size**2, min(k + TIES, coords.num_points))
    for image, pixels in enumerate(coords.index.tolist()):
        for node, expected in enumerate(reference.nearest(pixels, coords.size, grid_size, k)):
            count = len(expected)
            assert place[image, node, :count].tolist() == [one for _, _, one in expected]
            exact = pytest.approx([float(distance) for distance, _, _ in expected], rel=1e-6)
            assert squared_distance[image, node, :count].tolist() == exact
            assert (squared_distance[image, node, count:] == torch.inf).all() and not place[image, node, count:].any()


@pytest.mark.parametrize("backend", SEARCHES)
@pytest.mark.parametrize("size", SIZES)
def test_the_nearest_pixels_with_all_ties(backend, size):
    for grid_size in (1, 4, 5):
        for share in (0, 1 / 4, 1):
            _, coords = draw(size, share)
            for k in {1, 3, min(7, coords.num_points)}:
                check_nearest(coords, grid_size, k, backend)


@pytest.mark.parametrize("backend", SEARCHES)
@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_nearest_pixels_in_one_corner_or_in_clusters(backend, k):
    image = torch.arange(16 * 24).view(16, 24)
    corner, edge = image[11:, :7].flatten(), image[-2:].flatten()[:35]
    clusters = torch.cat([image[:2, :9].flatten(), image[14:, 15:].flatten()])[:35]
    check_nearest(Coordinates(torch.stack([corner, clusters, edge]), (16, 24)), 5, k, backend)


@pytest.mark.parametrize(("size", "grid_size"), [((32, 32), 16), ((24, 48), 16), ((20, 50), 17), ((200, 2), 5)])
def test_searches_are_bit_identical(monkeypatch, size, grid_size):
    """The loops and plain PyTorch, for all nodes at once and for some at a time."""
    for share in (1, 1 / 4, 1 / 32):
        _, coords = draw(size, share)
        found = [nearest_pixels(coords, grid_size, 3, backend) for backend in SEARCHES]
        with monkeypatch.context() as patch:
            patch.setattr(interpolation, "CHUNK", 20 * coords.index.numel())
            found.append(nearest_pixels(coords, grid_size, 3, "torch_dense"))
        for other in found[1:]:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))


def test_full_images_share_one_search_and_subsets_are_searched_once(monkeypatch):
    assert nearest_pixels(Coordinates.full(3, (6, 6)), 4, 3)[0].stride(0) == 0
    searches, search = [], interpolation.nearest_pixels
    monkeypatch.setattr(interpolation, "nearest_pixels", lambda *given: searches.append(given[1:3]) or search(*given))
    features, coords = draw((8, 8), 0.5)
    for grid_size, k in [(4, 3), (4, 3), (4, 2), (8, 3), (4, 3)]:
        knn_to_grid(features, coords, grid_size, k)
    assert searches == [(4, 3), (4, 2), (8, 3)]


def test_too_few_points_are_refused():
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k={k} nearest points .* 2 points"):
            knn_to_grid(torch.zeros(1, 2, 1), Coordinates.random(1, (4, 4), 2), 4, k)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid_size", [1, 4, 7])
def test_both_interpolations_agree_with_loops(size, grid_size):
    grid = torch.randn(2, 3, grid_size, grid_size, generator=torch.Generator().manual_seed(1))
    for share in (1 / 4, 1):
        features, coords = draw(size, share)
        there, back = knn_to_grid(features, coords, grid_size), grid_to_points(grid, coords)
        for image, pixels in enumerate(coords.index.tolist()):
            expected = reference.knn_to_grid(features[image].double().numpy(), pixels, size, grid_size, 3)
            np.testing.assert_allclose(there[image].numpy(), expected, rtol=1e-4, atol=1e-5)
            expected = reference.grid_to_points(grid[image].double().numpy(), pixels, size)
            np.testing.assert_allclose(back[image].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "grid_size"), RATIOS)
def test_on_full_images_the_interpolation_to_the_grid_has_the_symmetries_of_the_square(size, grid_size):
    def to_grid(image):
        coords = Coordinates.full(1, image.shape[-2:])
        return knn_to_grid(coords.gather(image), coords, grid_size)

    image = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0))
    grid = to_grid(image)
    for turn in (lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.mT):
        torch.testing.assert_close(to_grid(turn(image)), turn(grid))


@pytest.mark.parametrize(("size", "grid_size"), WHOLE_RATIOS)
def test_a_linear_ramp_is_reproduced_away_from_the_border(size, grid_size):
    coords = Coordinates.full(1, size)
    grid = knn_to_grid(coords.positions, coords, grid_size)  # x and y themselves
    x = ((torch.arange(grid_size) + 0.5) / grid_size).expand(grid_size, -1)
    error = (grid[0] - torch.stack([x, x.T])).abs()
    assert error[:, 1:-1, 1:-1].max() < 1e-6


def test_a_ramp_is_read_back_with_x_along_columns_and_clamped():
    node = (torch.arange(8) + 0.5) / 8
    ramp = 2 * node[None, :] + 0.25 * node[:, None]
    coords = Coordinates.full(1, (24, 16))
    x, y = coords.positions.unbind(-1)
    out = grid_to_points(ramp[None, None], coords)[..., 0]
    inside = (x - 0.5).abs().maximum((y - 0.5).abs()) <= 0.5 - 1 / 16
    torch.testing.assert_close(out[inside], (2 * x + 0.25 * y)[inside], rtol=0, atol=1e-6)
    assert out[0, 0] == ramp[0, 0] and out[0, -1] == ramp[-1, -1]


def test_constants_and_pixels_on_nodes_are_kept():
    for dtype, rtol in ((torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for share in (1 / 8, 1):
            features, coords = draw((9, 14), share)
            grid = knn_to_grid(torch.full_like(features, 3.0, dtype=dtype), coords, 5)
            assert grid.dtype == dtype and grid.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(grid, torch.full_like(grid, 3.0), rtol=rtol, atol=0)
    features, coords = draw((8, 8), 1)
    torch.testing.assert_close(knn_to_grid(features, coords, 8), coords.scatter(features), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_linear_maps(dtype):
    _, coords = draw((6, 7), 0.5)
    generator = torch.Generator().manual_seed(1)
    for function, shape in [(lambda a: knn_to_grid(a, coords, 3), (2, 21, 3)),
                            (lambda a: grid_to_points(a, coords), (2, 3, 4, 4))]:
        a = torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()
        out = function(a)
        direction, cotangent = torch.randn_like(a), torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, a, cotangent)
        torch.testing.assert_close((gradient * direction).sum(), (function(direction) * cotangent).sum())


def test_half_precision_stays_close_and_autocast_changes_nothing():
    features, coords = draw((8, 8), 0.5)
    grid = knn_to_grid(features, coords, 4)
    back = grid_to_points(grid, coords)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knn_to_grid(features, coords, 4), grid) and torch.equal(grid_to_points(grid, coords), back)
        half = knn_to_grid(features.bfloat16(), coords, 4)
        again = grid_to_points(half, coords)
    assert half.dtype == again.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), grid, rtol=0, atol=0.05)
    torch.testing.assert_close(again.float(), back, rtol=0, atol=0.05)
