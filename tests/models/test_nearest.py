import itertools

import pytest
import torch

from data.coordinates import Coordinates
from models import nearest
from models.nearest import nearest_pixels
from tests.reference.interpolation import nearest as slow_nearest


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def search(request, monkeypatch):
    """Both searches give the same answer; torch's is what runs on other devices or without numba."""
    if request.param == "torch":
        monkeypatch.setattr(nearest.compiled, "is_available", lambda: False)
    elif not nearest.compiled.is_available():
        pytest.skip("numba is not installed")
    return request.param


def shuffled(pixels, size, seed=0):
    """Coordinates of the given pixels [B, L], in an order of their own in each image."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(pixels.shape, generator=generator).argsort(dim=1)
    return Coordinates(pixels.gather(1, order), size)


def draw(size, num_points, batch=2):
    generator = torch.Generator().manual_seed(num_points)
    return shuffled(Coordinates.random(batch, size, num_points, generator=generator).index, size)


def check_against_the_definition(coords, grid_size, k):
    place, squared_distance = nearest_pixels(coords, grid_size, k)
    assert place.dtype == torch.int64 and squared_distance.dtype == torch.float32
    assert place.shape == squared_distance.shape == (coords.batch, grid_size**2, k)
    for b, pixels in enumerate(coords.index.tolist()):
        for node, expected in enumerate(slow_nearest(pixels, coords.size, grid_size, k)):
            assert place[b, node].tolist() == [p for _, _, p in expected]
            assert squared_distance[b, node].tolist() == pytest.approx([float(d) for d, _, _ in expected], rel=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (12, 5), (1, 6), (40, 1)])
@pytest.mark.parametrize("grid_size", [1, 4, 5, 11])
def test_exact_with_ties_by_raster_index(size, grid_size):
    pixels = size[0] * size[1]
    for num_points in {1, 3, pixels // 4, pixels // 2, pixels}:
        coords = draw(size, num_points)
        for k in {1, min(3, num_points), min(7, num_points), min(num_points, 12)}:
            check_against_the_definition(coords, grid_size, k)


@pytest.mark.parametrize(("size", "grid_size"), [
    ((64, 64), 32), ((48, 96), 32), ((40, 100), 33), ((35, 65), 20), ((40, 64), 65), ((200, 2), 5),
])
@pytest.mark.parametrize("share", [1, 4, 32])
def test_grids_of_many_rows(monkeypatch, size, grid_size, share):
    """Both searches agree bit for bit, also where a thread has several bands of rows, and lists are long."""
    coords = draw(size, size[0] * size[1] // share, batch=3)
    found = nearest_pixels(coords, grid_size, 3)
    monkeypatch.setattr(nearest, "_choose_search", lambda table: nearest._search_torch)
    for ours, theirs in zip(found, nearest_pixels(coords, grid_size, 3), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_exact_for_points_in_one_corner_or_in_clusters(k):
    size = (16, 24)
    image = torch.arange(16 * 24).view(size)
    corner = image[11:, :7].flatten()
    clusters = torch.cat([image[:2, :9].flatten(), image[14:, 15:].flatten()])[:35]
    edge = image[-2:, :].flatten()[:35]
    check_against_the_definition(shuffled(torch.stack([corner, clusters, edge]), size), 9, k)


def test_lists_may_end_anywhere(monkeypatch):
    """Nodes that the lists of offsets do not serve are served all the same."""
    coords = draw((9, 14), 20)
    for mean_points, k in itertools.product((0.1, 0.5, 1, 3), (1, 3)):
        monkeypatch.setattr(nearest, "MEAN_POINTS", mean_points)
        nearest._offsets.cache_clear()
        check_against_the_definition(coords, 11, k)
    nearest._offsets.cache_clear()


def test_chunks_change_nothing(monkeypatch):
    coords = draw((13, 10), 12, batch=3)
    expected = nearest_pixels(coords, 8, 5)
    monkeypatch.setattr(nearest, "CHUNK", 100)
    for ours, theirs in zip(nearest_pixels(coords, 8, 5), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(6, 6), (5, 8)])
def test_full_images_have_one_geometry(size):
    check_against_the_definition(Coordinates.full(3, size), 4, 3)
    assert nearest_pixels(Coordinates.full(3, size), 4, 3)[0].stride(0) == 0


def test_a_node_on_a_pixel_is_at_distance_zero():
    place, squared_distance = nearest_pixels(Coordinates.full(1, (6, 6)), 6, 1)
    assert torch.equal(place.flatten(), torch.arange(36))
    assert (squared_distance == 0).all()


def test_agrees_with_sorting_all_distances_at_scale():
    """Half a large, thin image is empty; distances in double precision, ties by position in raster order."""
    height, width, grid_size, k = 40, 100, 25, 4
    index = Coordinates.random(1, (height // 2, width), 300, generator=torch.Generator().manual_seed(3)).index
    coords = Coordinates(index, (height, width))
    line = (torch.arange(grid_size) + 0.5).double() / grid_size
    nodes = torch.cartesian_prod(line, line).flip(1)
    row, column = (index[0] // width + 0.5).double(), (index[0] % width + 0.5).double()
    pixels = torch.stack([column / width, row / height], dim=1)
    distance = (nodes[:, None] - pixels).square().sum(dim=2)
    place, squared_distance = nearest_pixels(coords, grid_size, k)
    expected = distance.sort(dim=1).values[:, :k]
    torch.testing.assert_close(squared_distance[0].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(distance.gather(1, place[0]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_not_exceed_the_number_of_points(k):
    with pytest.raises(ValueError, match="nearest pixels do not exist"):
        nearest_pixels(draw((4, 4), 4), 4, k)
