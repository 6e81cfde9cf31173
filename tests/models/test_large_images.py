"""Large images in parts: the same numbers as of the whole, from blocks that see at most max_points points."""

import pytest
import torch

from data.coordinates import Coordinates
from experiments.lib.benchmark_suites import peak_memory
from models.interpolation import grid_to_points
from models.large_images import Window, check_max_points
from tests.models.tiny import draw, tiny_decoder, tiny_encoder
from utils.errors import UserError

IMAGE = (13, 21)
# (size, max_points): whole rows and squares, halos clipped on one side and both, one part and many
CASES = [((32, 32), 200), ((48, 20), 150), ((17, 41), 170), ((19, 64), 500), ((64, 64), 1200), ((16, 16), 60)]


@pytest.fixture
def work(monkeypatch):
    """(function that watches a model, points that each call of its sparse blocks took)."""
    taken = []

    def watch(model):
        for block in [*model.points_to_grid.blocks, *getattr(model, "blocks", [])]:
            block.register_forward_pre_hook(lambda module, args: taken.append(args[0].shape[:2].numel()))
        return model

    return watch, taken


def inputs(size, batch):
    values, t, z, _ = draw(batch, size, share=1)
    return values, t, z, Coordinates.full(batch, size)


@pytest.mark.parametrize(("size", "max_points"), CASES)
@pytest.mark.parametrize("batch", [1, 2])
def test_decoder_and_encoder(work, size, max_points, batch):
    values, t, z, coords = inputs(size, batch)
    (watch, taken), decoder, encoder = work, tiny_decoder(), tiny_encoder(stochastic_encoding=True)
    with torch.no_grad():
        expected, latent = decoder(values, t, z, coords), encoder(values, coords)
        out = watch(decoder)(values, t, z, coords, max_points=max_points * batch)
        again = watch(encoder)(values, coords, max_points=max_points * batch)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, latent, rtol=1e-4, atol=1e-5)
    assert max(taken) <= max_points * batch and len(taken) > 12


@pytest.mark.parametrize("options", [
    {"uno_res": 32, "uno_attn_resolutions": ()}, {"depthwise_sparse": False}, {"operator": "consistent"},
    {"backend": "torch_dense"}])
def test_a_grid_finer_than_the_image_full_kernels_and_gradients(options):
    values, t, z, coords = inputs((24, 20), 1)
    values, decoder = values.requires_grad_(), tiny_decoder(**options)
    found = []
    for max_points in (None, 120):
        out = decoder(values, t, z, coords, max_points=max_points)
        found.append([out, *torch.autograd.grad(out.square().sum(), [values, *decoder.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_small_images_and_subsets_are_not_split(work):
    (watch, taken), decoder = work, tiny_decoder()
    watch(decoder)
    values, t, z, coords = inputs((16, 16), 2)
    decoder(values, t, z, coords, max_points=512)
    values, t, z, coords = draw(2)
    decoder(values, t, z, coords, max_points=60)
    assert taken == [512] * 4 + [128] * 4


def test_a_window_needs_only_the_grid_and_the_points_within_reach():
    """It is exact with half a kernel per block around it, and not with a pixel less."""
    size, decoder = (40, 56), tiny_decoder(num_conv_blocks=1, backend="torch_dense").double()
    values, t, z, coords = inputs(size, 2)
    values, z = values.double(), z.double()
    image, target = Window.whole(2, size), Window(2, size, (8, 16), (30, 41))
    with torch.no_grad():
        expected = target.take(decoder(values, t, z, coords), image)
        grid = decoder.grid_features(values, t, z, image, max_points=1000)
        blocks = [*decoder.points_to_grid.blocks, *decoder.blocks]
        halo = [sum(halves) for halves in zip(*(block.halo(size) for block in blocks), strict=True)]
        for shrink, exact in ((0, True), (1, False)):
            around = target.grown([halo[0] - shrink, halo[1]])
            assert around.num_points < image.num_points
            out = target.take(decoder(around.take(values, image), t, z, around, grid), around)
            assert ((out - expected).abs().max() < 1e-12) == exact
        with pytest.raises(ValueError, match="the grid of the whole image"):
            decoder(around.take(values, image), t, z, around)


def test_memory_follows_max_points():
    """Peak memory in units of the features of all points; skip, merged features and their input remain."""
    decoder, peaks = tiny_decoder(nf=16, kernel_size=1, num_conv_blocks=1), []
    values, t, z, coords = inputs((64, 64), 1)
    for max_points in (None, 1024, 256):
        with torch.no_grad():
            peak = peak_memory(lambda most=max_points: decoder(values, t, z, coords, max_points=most), values.device)
        peaks.append(peak / (coords.num_points * 16 * 4))
    assert peaks[0] > 9 and peaks[1] < 5.5 and peaks[2] < 4.5


def test_mixed_precision_stays_close():
    values, t, z, coords = inputs((40, 32), 1)
    decoder = tiny_decoder()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out, expected = (decoder(values, t, z, coords, max_points=most) for most in (300, None))
    assert out.dtype == torch.float32
    assert (out - expected).square().mean().sqrt() < 0.02 * expected.std()


@pytest.mark.parametrize(("size", "least"), [((32, 48), 180), ((128, 128), 2116)])  # kernels of 5x9 and 23x23 pixels
def test_too_few_points_for_the_kernels_are_refused(size, least):
    values, t, z, coords = inputs(size, 2)
    decoder = tiny_decoder()
    message = f"--max_points={least // 2} .* {size[0]}x{size[1]} .* least {least}"
    with pytest.raises(UserError, match=message), torch.no_grad():
        decoder(values, t, z, coords, max_points=least // 2)
    with pytest.raises(UserError, match="--max_points=40 is too few"):
        check_max_points(decoder, size, 40)
    check_max_points(decoder, size, least)
    check_max_points(decoder, (16, 16), 256)


@pytest.mark.parametrize(("rows", "columns"), [((0, 13), (0, 21)), ((2, 7), (20, 21)), ((0, 1), (3, 9))])
def test_a_window_has_the_geometry_of_its_pixels_in_the_image(rows, columns):
    whole, window = Coordinates.full(2, IMAGE), Window(2, IMAGE, rows, columns)
    inside = (..., slice(*rows), slice(*columns))
    assert torch.equal(window.positions, window.gather(whole.scatter(whole.positions)[inside]))
    grid = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(window.scatter(grid_to_points(grid, window)), whole.scatter(grid_to_points(grid, whole))[inside])
    assert window.image_size == whole.image_size == IMAGE and window.is_full and window.is_raster


@pytest.mark.parametrize(("rows", "columns", "expected"), [
    ((5, 7), (9, 10), ((3, 9), (6, 13))), ((0, 7), (9, 21), ((0, 9), (6, 21))), ((1, 12), (2, 19), ((0, 13), (0, 21)))])
def test_a_window_grows_as_far_as_the_image_goes(rows, columns, expected):
    grown = Window(1, IMAGE, rows, columns).grown((2, 3))
    assert (grown.rows, grown.columns) == expected and grown.image_size == IMAGE


def test_take_and_put():
    whole, outer, inner = (Window(2, IMAGE, *spans) for spans in (
        ((0, 13), (0, 21)), ((2, 9), (4, 20)), ((5, 6), (4, 9))))
    values = torch.arange(2 * 273 * 2.0).view(2, 273, 2)
    taken = inner.take(outer.take(values, whole), outer)
    assert torch.equal(inner.scatter(taken), whole.scatter(values)[..., 5:6, 4:9])
    out = torch.zeros_like(values)
    inner.put(taken, whole, out)
    assert torch.equal(inner.take(out, whole), taken) and out.sum() == taken.sum()


@pytest.mark.parametrize("window", [((0, 13), (0, 21)), ((3, 11), (5, 20))])
@pytest.mark.parametrize("halo", [(0, 0), (1, 1), (2, 4)])
@pytest.mark.parametrize("most", [60, 100, 180, 1000])
def test_parts_cover_every_pixel_once_and_are_small_enough(window, halo, most):
    whole = Window(1, IMAGE, *window)
    parts, covered = whole.split(halo, most), torch.zeros(1, whole.num_points, 1)
    for part in parts:
        assert part.grown(halo, whole).num_points <= most and not part.take(covered, whole).any()
        part.put(torch.ones(1, part.num_points, 1), whole, covered)
    assert covered.all() and (most < 1000 or len(parts) == 1)


def test_parts_are_those_that_cost_least():
    """Whole rows if the halo is narrow, squares if it is wide; none if halos would be most of the work."""
    bands = Window.whole(1, (64, 16)).split((1, 1), 16 * 10)
    assert {part.columns for part in bands} == {(0, 16)} and len(bands) == 8
    square = Window.whole(1, (100, 100)).split((10, 10), 40 * 40)
    assert max(part.size[0] for part in square) == max(part.size[1] for part in square) == 20
    assert {part.size for part in Window.whole(1, (96, 96)).split((6, 6), 16 * 16)} == {(4, 4)}
    with pytest.raises(UserError, match="--max_points=225 is too few"):
        Window.whole(1, (96, 96)).split((6, 6), 15 * 15)


@pytest.mark.parametrize(("rows", "columns"), [((0, 14), (0, 3)), ((3, 3), (0, 3)), ((-1, 3), (0, 3))])
def test_windows_outside_the_image_are_refused(rows, columns):
    with pytest.raises(ValueError, match="window of"):
        Window(1, IMAGE, rows, columns)
