"""A window has the geometry of its pixels in the whole image."""

import pytest
import torch

from data.coordinates import Coordinates
from models.interpolation import grid_to_points
from models.large_images import Window
from utils.errors import UserError

IMAGE = (13, 21)


def values_of(coords, channels=2):
    return torch.arange(coords.num_points * channels).float().view(1, -1, channels).expand(coords.batch, -1, -1)


@pytest.mark.parametrize("rows, columns", [((0, 13), (0, 21)), ((2, 7), (20, 21)), ((0, 1), (3, 9))])
def test_positions_and_read_back_are_those_of_the_pixels_in_it(rows, columns):
    whole, window = Coordinates.full(2, IMAGE), Window(2, IMAGE, rows, columns)
    image = whole.scatter(whole.positions)[..., slice(*rows), slice(*columns)]
    assert torch.equal(window.positions, window.gather(image))
    grid = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = whole.scatter(grid_to_points(grid, whole))[..., slice(*rows), slice(*columns)]
    assert torch.equal(window.scatter(grid_to_points(grid, window)), expected)
    assert window.image_size == whole.image_size == IMAGE and window.is_full and window.is_raster


@pytest.mark.parametrize("rows, columns, halo, expected", [
    ((5, 7), (9, 10), (2, 3), ((3, 9), (6, 13))),
    ((0, 7), (9, 21), (2, 3), ((0, 9), (6, 21))),
    ((1, 12), (2, 19), (2, 3), ((0, 13), (0, 21))),
])
def test_it_grows_as_far_as_the_image_goes(rows, columns, halo, expected):
    grown = Window(1, IMAGE, rows, columns).grown(halo)
    assert (grown.rows, grown.columns) == expected and grown.image_size == IMAGE


def test_take_and_put():
    whole, outer = Window.whole(2, IMAGE), Window(2, IMAGE, (2, 9), (4, 20))
    inner = Window(2, IMAGE, (5, 6), (4, 9))
    image = whole.scatter(values_of(whole))
    taken = inner.take(outer.take(values_of(whole), whole), outer)
    assert torch.equal(inner.scatter(taken), image[..., 5:6, 4:9])
    out = torch.zeros(2, whole.num_points, 2)
    inner.put(taken, whole, out)
    expected = torch.zeros_like(image)
    expected[..., 5:6, 4:9] = image[..., 5:6, 4:9]
    assert torch.equal(whole.scatter(out), expected)


@pytest.mark.parametrize("window", [((0, 13), (0, 21)), ((3, 11), (5, 20))])
@pytest.mark.parametrize("halo", [(0, 0), (1, 1), (2, 4)])
@pytest.mark.parametrize("most", [60, 100, 180, 1000])
def test_parts_cover_every_pixel_once_and_are_small_enough(window, halo, most):
    whole = Window(1, IMAGE, *window)
    parts = whole.split(halo, most)
    covered = torch.zeros(1, whole.num_points, 1)
    for part in parts:
        assert part.grown(halo, whole).num_points <= most
        assert not part.take(covered, whole).any()
        part.put(torch.ones(1, part.num_points, 1), whole, covered)
    assert covered.all()
    if most == 1000:
        assert len(parts) == 1


def test_parts_are_the_ones_that_cost_least():
    """Whole rows where the halo is narrow; squares where it is wide."""
    bands = Window.whole(1, (64, 16)).split((1, 1), 16 * 10)
    assert {part.columns for part in bands} == {(0, 16)} and len(bands) == 8
    square = Window.whole(1, (100, 100)).split((10, 10), 40 * 40)
    assert max(part.size[0] for part in square) == max(part.size[1] for part in square) == 20


def test_no_parts_where_the_halo_would_be_most_of_the_work():
    whole = Window.whole(1, (96, 96))
    with pytest.raises(UserError, match="max_points=225 is too few"):
        whole.split((6, 6), 15 * 15)
    parts = whole.split((6, 6), 16 * 16)
    assert {part.size for part in parts} == {(4, 4)}


@pytest.mark.parametrize("rows, columns", [((0, 14), (0, 3)), ((3, 3), (0, 3)), ((-1, 3), (0, 3))])
def test_windows_outside_the_image_are_refused(rows, columns):
    with pytest.raises(ValueError, match="window of"):
        Window(1, IMAGE, rows, columns)
