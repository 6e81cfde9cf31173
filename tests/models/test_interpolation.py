import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.coordinates import Coordinates
from models import compiled
from models.interpolation import grid_to_points, knn_to_grid
from tests.reference import interpolation as reference

SIZES = [(8, 8), (7, 9), (5, 12), (16, 6)]


def draw(size, density, batch=2, channels=3):
    """(features, coords); pixels are in no particular order."""
    generator = torch.Generator().manual_seed(0)
    pixels = size[0] * size[1]
    order = torch.rand(batch, pixels, generator=generator).argsort(dim=1)
    coords = Coordinates(order[:, : max(5, int(pixels * density))], size)
    return torch.randn(batch, coords.num_points, channels, generator=generator), coords


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [1, 1 / 2, 1 / 8])
@pytest.mark.parametrize(("grid_size", "k"), [(4, 3), (5, 1), (8, 3), (6, 5)])
def test_knn_to_grid_agrees_with_exact_search(size, density, grid_size, k):
    features, coords = draw(size, density)  # at density 1, (8, 8) and grid 4, every node is as far from four pixels
    grid = knn_to_grid(features, coords, grid_size, k)
    for image in range(coords.batch):
        pixels = coords.index[image].tolist()
        expected = reference.knn_to_grid(features[image].double().numpy(), pixels, size, grid_size, k)
        np.testing.assert_allclose(grid[image].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_sum_to_one(dtype):
    for density in (1, 1 / 4):
        _, coords = draw((9, 12), density)
        grid = knn_to_grid(torch.full((2, coords.num_points, 1), 3.0, dtype=dtype), coords, 8)
        assert grid.dtype == dtype
        rtol = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(grid, torch.full_like(grid, 3.0), rtol=rtol, atol=0)


def test_a_point_on_a_node_takes_all_of_its_weight():
    features, coords = draw((8, 8), 1)
    torch.testing.assert_close(knn_to_grid(features, coords, 8), coords.scatter(features), rtol=0, atol=0)


def test_raster_order_is_nothing_special():
    full = Coordinates.full(2, (6, 10))
    features, shuffled = draw((6, 10), 1)
    image = shuffled.scatter(features)
    torch.testing.assert_close(knn_to_grid(full.gather(image), full, 4), knn_to_grid(features, shuffled, 4))
    grid = torch.randn(2, 3, 4, 4)
    back, expected = (coords.scatter(grid_to_points(grid, coords)) for coords in (full, shuffled))
    torch.testing.assert_close(back, expected)


def test_knn_to_grid_is_ready_for_convolutions():
    features, coords = draw((8, 8), 0.5)
    assert knn_to_grid(features, coords, 4).is_contiguous(memory_format=torch.channels_last)


def test_more_neighbours_than_points_are_refused():
    coords = Coordinates.random(1, (4, 4), 2)
    with pytest.raises(ValueError, match="k=3.* 2 "):
        knn_to_grid(torch.zeros(1, 2, 1), coords, 4, k=3)


def test_the_search_runs_once_per_grid_and_k(monkeypatch):
    from models import interpolation

    searches = []
    search = interpolation.nearest_pixels
    monkeypatch.setattr(interpolation, "nearest_pixels", lambda *a: searches.append(a[1:]) or search(*a))
    features, coords = draw((8, 8), 0.5)
    for grid_size, k in [(4, 3), (4, 3), (4, 2), (8, 3), (4, 3)]:
        knn_to_grid(features, coords, grid_size, k)
    assert searches == [(4, 3), (4, 2), (8, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid_size", [1, 4, 7, 16])
def test_grid_to_points_agrees_with_loops_and_grid_sample(size, grid_size):
    _, coords = draw(size, 0.5)
    grid = torch.randn(2, 3, grid_size, grid_size, generator=torch.Generator().manual_seed(1))
    out = grid_to_points(grid, coords)
    for image in range(2):
        expected = reference.grid_to_points(grid[image].double().numpy(), coords.index[image].tolist(), size)
        np.testing.assert_allclose(out[image].numpy(), expected, rtol=1e-4, atol=1e-5)
    sampled = F.grid_sample(grid, coords.positions[:, :, None] * 2 - 1, padding_mode="border", align_corners=False)
    torch.testing.assert_close(out, sampled[..., 0].transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_grid_to_points_reproduces_a_ramp_with_x_along_columns():
    node = (torch.arange(8) + 0.5) / 8
    ramp = 2 * node[None, :] + 0.25 * node[:, None]  # 2 x + y / 4: a transposition or a flip would show
    coords = Coordinates.full(1, (24, 16))
    x, y = coords.positions.unbind(-1)
    out = grid_to_points(ramp[None, None], coords)[..., 0]
    inside = (x - 0.5).abs().maximum((y - 0.5).abs()) <= 0.5 - 1 / 16
    torch.testing.assert_close(out[inside], (2 * x + 0.25 * y)[inside], rtol=0, atol=1e-6)
    assert out[0, 0] == ramp[0, 0] and out[0, -1] == ramp[-1, -1]  # clamped at the border


def test_there_and_back_keeps_the_axes():
    coords = Coordinates.full(1, (32, 32))
    x, y = coords.positions.unbind(-1)
    ramp = torch.stack([x, 3 * y], dim=-1)
    back = grid_to_points(knn_to_grid(ramp, coords, 16), coords)
    assert (back - ramp).abs().max() < 3 * 1.5 / 32  # a pixel and a half


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loops", [True, False])
def test_gradients_are_those_of_the_weighted_sums(dtype, loops, monkeypatch):
    if not loops:  # as without numba
        monkeypatch.setattr("models.interpolation.compiled.is_available", lambda: False)
    features, coords = draw((6, 7), 0.5)
    for function, shape in [
        (lambda a: knn_to_grid(a, coords, 3), features.shape),
        (lambda a: grid_to_points(a, coords), (2, 3, 4, 4)),
    ]:
        a = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = function(a)
        direction, cotangent = torch.randn_like(a), torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, a, cotangent)
        torch.testing.assert_close((gradient * direction).sum(), (function(direction) * cotangent).sum())  # linear


@pytest.mark.skipif(not compiled.is_available(), reason=compiled.unavailable_reason())
def test_second_derivatives_are_refused_where_the_gradient_is_by_loops():
    coords = Coordinates.random(1, (6, 5), 12)
    x = torch.randn(1, 12, 4, requires_grad=True)
    loss = knn_to_grid(x, coords, 4).sum() + x.pow(3).sum()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_touch_the_weights(dtype):
    features, coords = draw((8, 8), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        grid = knn_to_grid(features.to(dtype), coords, 4)
        back = grid_to_points(grid, coords)
    assert grid.dtype == back.dtype == dtype
    fresh = Coordinates(coords.index, coords.size)
    tolerance = {"rtol": 0, "atol": 0.05 if dtype == torch.bfloat16 else 0}
    torch.testing.assert_close(grid.float(), knn_to_grid(features, fresh, 4), **tolerance)
    torch.testing.assert_close(back.float(), grid_to_points(grid.float(), fresh), **tolerance)
