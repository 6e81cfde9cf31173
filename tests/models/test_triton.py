"""The Triton kernels on a GPU, or with TRITON_INTERPRET=1 on a CPU, as test_triton_kernels.py runs this file."""

import functools

import pytest
import torch

from data.coordinates import Coordinates
from models.interpolation import TIES, knn_to_grid, search_nearest_pixels
from models.kernels import gpu
from models.sparse_conv import resolve_backend, sparse_conv
from tests.models import operator
from tests.models.operator import check_against_loops, check_second_derivatives, results
from tests.models.tiny import draw as draw_inputs
from tests.models.tiny import tiny_decoder

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(bool(gpu.unavailable_reason(True)), reason=gpu.unavailable_reason(True))]
DEVICE = "cpu" if gpu.INTERPRETED else "cuda"
draw = functools.partial(operator.draw, device=DEVICE)
triton = functools.partial(sparse_conv, backend="triton")
dense = functools.partial(sparse_conv, backend="torch_dense")
kinds = pytest.mark.parametrize("outputs", [(), (6,)], ids=["depthwise", "full"])


@kinds
@pytest.mark.parametrize(("size", "kernel_size", "density", "order"), [
    ((4, 7), (7, 7), 1 / 2, "sorted"), ((3, 5), (5, 5), 1, "raster"), ((9, 6), (3, 7), 1 / 4, "shuffled"),
    ((12, 5), (1, 1), 1 / 8, "sorted"), ((1, 6), (7, 3), 1, "shuffled"), ((11, 9), (3, 3), 0, "sorted"),
])
def test_the_operator_is_the_definition(outputs, size, kernel_size, density, order):
    check_against_loops(triton, *draw(size, density, (*kernel_size, 5, *outputs), order), 1e-4)


@pytest.mark.parametrize("channels", [(1,), (70,), (1, 1), (33, 3), (16, 70)])
def test_any_number_of_channels(channels):
    """Fewer than a block has, several blocks, and neither a power of two."""
    check_against_loops(triton, *draw((6, 7), 1 / 3, (1, 3, *channels), "sorted"), 1e-4)


@kinds
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.08), (torch.float16, 0.01)])
def test_half_precision_and_a_float32_weight(dtype, tolerance, outputs):
    features, weight, coords = draw((4, 5), 1 / 2, (3, 3, 5, *outputs), "shuffled", dtype)
    for other in (weight, weight.detach().to(dtype).requires_grad_()):
        check_against_loops(triton, features, other, coords, tolerance)


@kinds
def test_parts_of_the_points_are_added_up_in_the_same_order_each_time(outputs, monkeypatch):
    """Several blocks of points per part and several parts, the last one incomplete."""
    monkeypatch.setattr(gpu, "PARTS", {"depthwise": 3, "full": 3})
    monkeypatch.setattr(gpu, "POINTS", 16)
    monkeypatch.setattr(gpu, "SIDE", {2: 16, 4: 16})
    problem = draw((7, 11), 1 / 2, (1, 3, 5, *outputs), "sorted")
    found = check_against_loops(triton, *problem, 1e-4)
    assert all(torch.equal(ours, again) for ours, again in zip(found, results(triton, *problem), strict=True))


def test_sums_are_taken_in_float32(monkeypatch):
    """2,303 ones: a running sum in float16 stops at 2,048."""
    monkeypatch.setattr(gpu, "POINTS", 1024)
    monkeypatch.setattr(gpu, "SIDE", {2: 1024, 4: 1024})
    coords = Coordinates(torch.arange(47 * 49, device=DEVICE).flip(0)[None], (47, 49))
    features = torch.ones(1, 47 * 49, 1, dtype=torch.float16, device=DEVICE)
    for weight in (torch.ones(1, 1, 1, device=DEVICE), torch.ones(1, 1, 1, 1, device=DEVICE)):
        out = triton(features, weight.requires_grad_(), coords)
        assert torch.autograd.grad(out.float().sum(), weight)[0].item() == 2303


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_neighbours_and_no_further(value, outputs):
    coords = Coordinates(torch.tensor([[0, 1, 8]], device=DEVICE), (3, 3))
    features = torch.ones(1, 3, 4, device=DEVICE)
    features[0, 0] = value
    out = triton(features, torch.ones(3, 3, 4, *outputs, device=DEVICE), coords)
    assert not torch.isfinite(out[0, :2]).any() and torch.isfinite(out[0, 2]).all()


@kinds
def test_the_operators_keep_the_rules_of_pytorch(outputs):
    features, weight, coords = draw((2, 5), 1 / 2, (1, 3, 3, *outputs), "shuffled")
    geometry, grad = gpu._geometry(coords, (1, 3)), torch.randn(2, 5, weight.shape[-1], device=DEVICE)
    check = functools.partial(
        torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    check(torch.ops.infty_diff.triton_neighbour_sum.default, (features, weight, geometry))
    check(torch.ops.infty_diff.triton_neighbour_sum_weight_gradient.default,
          (features, grad.requires_grad_(), weight, geometry))
    check(torch.ops.infty_diff.triton_nearest_pixels.default, (coords.table, 2, 5, 2, 3, 5))


@kinds
def test_autocast_strides_and_the_order_of_the_index_change_nothing(outputs):
    features, weight, coords = draw((5, 6), 1 / 2, (3, 1, 4, *outputs), "sorted")
    expected = results(triton, features, weight, coords)
    apart = Coordinates(coords.index.T.contiguous().T, coords.size)
    strided = features.detach().mT.contiguous().mT.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = results(triton, strided, weight, apart)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@kinds
def test_second_derivatives_are_those_of_the_dense_form(outputs):
    problem = draw((5, 6), 1 / 2, (3, 1, 4, *outputs), "sorted")
    check_second_derivatives(triton, dense, problem, ("features", "weight", "grad"))


def test_float64_is_not_rounded_and_auto_means_triton_on_a_gpu():
    features, weight, coords = draw((5, 6), 1 / 2, (3, 3, 4), "sorted", torch.float64)
    assert torch.equal(triton(features, weight.double(), coords), dense(features, weight.double(), coords))
    assert {resolve_backend("auto", torch.device("cuda"), depthwise) for depthwise in (True, False)} == {"triton"}


def check_nearest(coords, grid_size, k):
    slots = min(k + TIES, coords.num_points)
    found = gpu.nearest_pixels(coords, grid_size, k, slots)
    place, squared_distance = search_nearest_pixels(coords, grid_size, k, slots)
    assert torch.equal(found[0], place)
    torch.testing.assert_close(found[1], squared_distance, rtol=1e-6, atol=0)


def shuffled(size, num_points):
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(2, size[0] * size[1], generator=generator).argsort(dim=1)
    return Coordinates(order[:, :num_points].to(DEVICE), size)


@pytest.mark.parametrize(("size", "num_points", "grid_size", "k"), [
    ((8, 8), 16, 4, 3), ((7, 9), 63, 5, 4), ((12, 5), 15, 7, 1), ((1, 6), 2, 3, 2), ((8, 8), 64, 4, 3),
    ((16, 8), 128, 2, 3),
])
def test_the_nearest_pixels_with_all_ties(size, num_points, grid_size, k):
    check_nearest(shuffled(size, num_points), grid_size, k)


def test_nodes_far_from_all_pixels_search_the_whole_image(monkeypatch):
    """Pixels in a corner or at two ends; then ties across the steps of a search that starts with the nearest pixel."""
    image = torch.arange(16 * 24).view(16, 24)
    index = torch.stack([image[12:, :5].flatten().flip(0), torch.cat([image[0, :8], image[15, 12:]])])
    check_nearest(Coordinates(index.to(DEVICE), (16, 24)), 3, 3)
    monkeypatch.setattr(gpu, "REACH", 0)
    monkeypatch.setattr(gpu, "PIXELS", 16)
    for k in (1, 3, 6):
        check_nearest(shuffled((8, 8), 64), 1, k)


def test_a_decoder_gives_the_same_as_in_plain_pytorch(monkeypatch):
    """With the nearest pixels by Triton too, which on a CPU the loops would find."""
    monkeypatch.setattr("models.interpolation.AUTO", ("triton",))
    values, t, z, coords = draw_inputs(1, (8, 6), share=1 / 2)
    expected = tiny_decoder(backend="torch_dense", uno_res=4, uno_attn_resolutions=())
    decoder = tiny_decoder(backend="triton", uno_res=4, uno_attn_resolutions=())
    for network in (decoder, expected):
        network.to(DEVICE)
    values, t, z, index = (one.to(DEVICE) for one in (values, t, z, coords.index))
    out, wanted = (network(values, t, z, Coordinates(index, coords.size)) for network in (decoder, expected))
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    assert knn_to_grid(values, Coordinates(index, coords.size), 4).shape == (1, 3, 4, 4)
