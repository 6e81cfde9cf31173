"""Random subsets of pixels, their evenness, and the geometry that follows from them."""

import pytest
import torch

from data.coordinates import KINDS, Coordinates, _smallest
from utils.rng import generator, sample_generators

SIZES = [(8, 8), (7, 5), (1, 9), (16, 3), (13, 24)]


def counts(size):
    pixels = size[0] * size[1]
    return sorted({1, 2, 3, pixels // 8 or 1, pixels // 4 or 1, pixels // 2, pixels - 1, pixels})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_subsets_are_distinct_sorted_and_in_range(kind, size):
    for num_points in counts(size):
        index = Coordinates.random(4, size, num_points, kind, generator("cpu", kind)).index
        assert index.dtype == torch.int64 and index.shape == (4, num_points)
        assert (index[:, 1:] > index[:, :-1]).all()
        assert index.min() >= 0 and index.max() < size[0] * size[1]


@pytest.mark.parametrize("values", [1, 2, 3, 1000])
def test_the_smallest_scores_are_taken_with_ties(values):
    score = torch.randint(values, (5, 40), generator=generator("cpu", values)).float()
    for count in (1, 7, 39, 40):
        taken = _smallest(score, count)
        assert taken.shape == (5, count) and (taken[:, 1:] > taken[:, :-1]).all()
        assert torch.equal(score.gather(1, taken).sort(1).values, score.sort(1).values[:, :count])


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_of_all_pixels_is_full(kind):
    coords = Coordinates.random(2, (6, 5), 30, kind, generator("cpu", 0))
    assert coords.is_full and coords.is_raster
    assert torch.equal(coords.index, Coordinates.full(2, (6, 5)).index)
    assert not Coordinates.random(2, (6, 5), 29, kind, generator("cpu", 0)).is_full


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_draws_the_same_subset_in_any_batch(kind):
    draw = lambda samples: Coordinates.random(  # noqa: E731
        len(samples), (9, 14), 31, kind, sample_generators("cpu", samples, "subset")).index
    whole = draw(range(6))
    assert torch.equal(whole, torch.cat([draw([0]), draw([1, 2, 3]), draw([4, 5])]))
    assert torch.equal(whole.flip(0), draw([5, 4, 3, 2, 1, 0]))
    assert len({tuple(row.tolist()) for row in whole}) == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "num_points"), [((8, 8), 16), ((7, 10), 9), ((5, 5), 20), ((16, 8), 16)])
def test_every_pixel_is_drawn_equally_often(kind, size, num_points):
    draws = 4000
    index = Coordinates.random(draws, size, num_points, kind, generator("cpu", kind, size)).index
    frequency = torch.bincount(index.flatten(), minlength=size[0] * size[1]) / draws
    expected = num_points / (size[0] * size[1])
    deviation = (expected * (1 - expected) / draws) ** 0.5
    assert (frequency - expected).abs().max() < 5 * deviation


def star_discrepancy(coords):
    """Largest difference between share of points and area over boxes with a corner at the origin, mean over B."""
    position = coords.positions.double()
    grid = torch.linspace(1 / 16, 1, 16, dtype=torch.float64)
    inside = position[:, :, None, :] <= grid[None, None, :, None]
    share = torch.einsum("blx,bly->bxy", inside[..., 0].double(), inside[..., 1].double()) / coords.num_points
    return (share - grid[:, None] * grid).abs().amax((1, 2)).mean()


@pytest.mark.parametrize("kind", ["halton", "stratified"])
@pytest.mark.parametrize(("size", "num_points"), [((32, 32), 256), ((32, 32), 128), ((48, 20), 240), ((64, 64), 64)])
def test_low_discrepancy(kind, size, num_points):
    even = star_discrepancy(Coordinates.random(32, size, num_points, kind, generator("cpu", 1)))
    uniform = star_discrepancy(Coordinates.random(32, size, num_points, "uniform", generator("cpu", 1)))
    assert even < 0.75 * uniform


@pytest.mark.parametrize(("size", "side"), [((8, 8), 2), ((12, 20), 4), ((6, 9), 3), ((5, 7), 1)])
def test_stratified_draws_one_pixel_from_each_square_cell(size, side):
    cells = (size[0] // side, size[1] // side)
    index = Coordinates.random(64, size, cells[0] * cells[1], "stratified", generator("cpu", 2)).index
    row, column = index // size[1], index % size[1]
    cell = row // side * cells[1] + column // side
    assert (cell.sort(dim=1).values == torch.arange(cells[0] * cells[1])).all()


def test_draws_differ_between_generators_and_kinds():
    draws = {(kind, seed): Coordinates.random(1, (16, 16), 64, kind, generator("cpu", seed)).index
             for kind in KINDS for seed in (0, 1)}
    assert len({tuple(index[0].tolist()) for index in draws.values()}) == len(draws)


def shuffled(size, num_points, batch=3):
    index = torch.stack([torch.randperm(size[0] * size[1], generator=generator("cpu", b))[:num_points]
                         for b in range(batch)])
    return Coordinates(index, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_gather_and_scatter_undo_each_other_in_any_order(size, dtype):
    for num_points in counts(size):
        coords = shuffled(size, num_points)
        values = torch.randn(3, num_points, 2, generator=generator("cpu", 3)).to(dtype)
        image = coords.scatter(values, fill=-7.0)
        assert image.shape == (3, 2, *size) and image.dtype == dtype
        assert torch.equal(coords.gather(image), values)
        assert (image == -7.0).sum() == 2 * 3 * (size[0] * size[1] - num_points)


@pytest.mark.parametrize("size", SIZES)
def test_gather_reads_the_pixel_at_row_times_width_plus_column(size):
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    image = torch.stack([rows, columns]).float().expand(3, -1, -1, -1)
    coords = shuffled(size, max(size[0] * size[1] // 3, 1))
    values = coords.gather(image).long()
    assert torch.equal(values[..., 0] * size[1] + values[..., 1], coords.index)


@pytest.mark.parametrize("size", SIZES)
def test_full_coordinates_agree_with_the_same_pixels_given_one_by_one(size):
    full = Coordinates.full(2, size)
    image = torch.randn(2, 3, *size, generator=generator("cpu", 4))
    listed = Coordinates(full.index.clone(), size)
    assert full.is_raster and full.is_full and listed.is_full and not listed.is_raster
    assert torch.equal(full.gather(image), listed.gather(image))
    assert torch.equal(full.scatter(full.gather(image)), image)
    assert torch.equal(listed.scatter(listed.gather(image)), image)


@pytest.mark.parametrize("size", SIZES)
def test_table_finds_every_pixel_or_says_minus_one(size):
    coords = shuffled(size, max(size[0] * size[1] // 2, 1))
    assert coords.table.dtype == torch.int32
    for b in range(3):
        places = {pixel: place for place, pixel in enumerate(coords.index[b].tolist())}
        assert coords.table[b].tolist() == [places.get(pixel, -1) for pixel in range(size[0] * size[1])]


def test_positions_are_pixel_centres_x_first():
    coords = Coordinates(torch.tensor([[0, 7, 4]]), (2, 4))
    assert torch.equal(coords.positions, torch.tensor([[[0.125, 0.25], [0.875, 0.75], [0.125, 0.75]]]))


def test_geometry_is_computed_once_and_kept_by_full_between_calls():
    made = []
    for coords in (shuffled((4, 4), 5), Coordinates.full(2, (4, 4)), Coordinates.full(2, [4, 4])):
        coords.cached("thing", lambda: made.append(1) or len(made))
        coords.cached("thing", lambda: made.append(1) or len(made))
    assert len(made) == 2


@pytest.mark.parametrize("index", [
    torch.tensor([[0, 1, 1]]), torch.tensor([[2, 0, 2]]), torch.tensor([[0, 12]]), torch.tensor([[-1, 3]]),
    torch.tensor([0, 1]), torch.tensor([[0, 1]], dtype=torch.int32)])
def test_a_wrong_index_is_refused(index):
    with pytest.raises(ValueError, match="index"):
        Coordinates(index, (3, 4))


@pytest.mark.parametrize(("num_points", "kind", "match"), [
    (0, "uniform", "num_points=0"), (13, "halton", "num_points=13"), (4, "sobol", "kind='sobol'")])
def test_a_wrong_request_is_refused(num_points, kind, match):
    with pytest.raises(ValueError, match=match):
        Coordinates.random(1, (3, 4), num_points, kind)
