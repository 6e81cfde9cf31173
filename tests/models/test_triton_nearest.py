"""Run on a GPU, or with TRITON_INTERPRET=1 on CPU, which test_triton_kernels.py does in a process of its own."""

import pytest
import torch

from data.coordinates import Coordinates
from models import nearest
from models.backends import triton
from models.nearest import nearest_pixels
from models.sparse_conv import INTERPRETED
from tests.reference.interpolation import nearest as slow_nearest

if not triton.is_available():
    pytest.skip(triton.unavailable_reason(), allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """On CPU the loops of numba would be."""
    monkeypatch.setattr(nearest.compiled, "is_available", lambda: False)
    assert nearest._choose_search(torch.empty(1, device=DEVICE)) is nearest._search_triton


def check_against_the_definition(coords, grid_size, k):
    place, squared_distance = nearest_pixels(coords, grid_size, k)
    assert place.dtype == torch.int64 and squared_distance.dtype == torch.float32
    for b, pixels in enumerate(coords.index.tolist()):
        for node, expected in enumerate(slow_nearest(pixels, coords.size, grid_size, k)):
            assert place[b, node].tolist() == [p for _, _, p in expected]
            assert squared_distance[b, node].tolist() == pytest.approx([float(d) for d, _, _ in expected], rel=1e-6)


def draw(size, num_points, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(2, size[0] * size[1], generator=generator).argsort(dim=1)
    return Coordinates(order[:, :num_points].to(DEVICE), size)


@pytest.mark.parametrize(("size", "num_points", "grid_size", "k"), [
    ((8, 8), 16, 4, 3), ((7, 9), 63, 5, 4), ((12, 5), 15, 7, 1), ((1, 6), 2, 3, 2),
])
def test_exact_with_ties_by_raster_index(size, num_points, grid_size, k):
    check_against_the_definition(draw(size, num_points), grid_size, k)


def test_exact_for_nodes_that_their_lists_do_not_serve(monkeypatch):
    """All points in a corner or at two ends, in any order; lists that are cut short."""
    image = torch.arange(16 * 24).view(16, 24)
    corner, ends = image[12:, :5].flatten(), torch.cat([image[0, :8], image[15, 12:]])
    index = torch.stack([corner.flip(0), ends])
    check_against_the_definition(Coordinates(index.to(DEVICE), (16, 24)), 3, 3)
    monkeypatch.setattr(nearest, "MEAN_POINTS", 0.5)
    nearest._offsets.cache_clear()
    check_against_the_definition(draw((9, 14), 20), 4, 2)
    nearest._offsets.cache_clear()


def test_ties_among_all_pixels_are_broken_by_raster_index(monkeypatch):
    """The four pixels nearest to the only node lie around it, two at the end of the first step over pixels and two at
    the beginning of the second; the list is too short for any of them.
    """
    monkeypatch.setattr(nearest, "MEAN_POINTS", 0.01)
    nearest._offsets.cache_clear()
    coords = draw((32, 16), 512)
    for k in (1, 3, 6):
        check_against_the_definition(coords, 1, k)
    place, _ = nearest_pixels(coords, 1, 4)
    assert coords.index.gather(1, place[:, 0]).tolist() == [[247, 248, 263, 264]] * 2
    nearest._offsets.cache_clear()


def test_agrees_with_the_search_in_torch(monkeypatch):
    coords = draw((12, 20), 60, seed=1)
    ours = nearest_pixels(coords, 8, 3)
    monkeypatch.setattr(nearest, "_choose_search", lambda table: nearest._search_torch)
    for value, theirs in zip(ours, nearest_pixels(coords, 8, 3), strict=True):
        assert torch.equal(value, theirs)
