import functools

import pytest
import torch

from data.coordinates import Coordinates
from models.backends import numba as backend
from models.sparse_conv import neighbour_counts
from tests.models import operator
from tests.models.operator import draw, gradients

pytestmark = pytest.mark.skipif(not backend.is_available(), reason=backend.unavailable_reason())

SIZES = [(8, 8), (7, 9), (11, 6)]
KERNELS = [(1, 1), (3, 3), (5, 5), (7, 7), (3, 7)]


check_against_loops = functools.partial(operator.check_against_loops, backend.sparse_conv)
ORDERS = [(1, "raster"), (1, "shuffled"), (1 / 2, "sorted"), (1 / 4, "shuffled"), (1 / 8, "sorted")]


@pytest.mark.parametrize(("density", "order"), ORDERS)
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_depthwise_is_the_definition(size, kernel_size, density, order):
    check_against_loops(*draw(size, density, (*kernel_size, 3), order), tolerance=1e-4)


@pytest.mark.parametrize("channels", [1, 32, 33])
@pytest.mark.parametrize(("density", "order"), ORDERS[::2])
def test_any_number_of_channels(channels, density, order):
    check_against_loops(*draw((7, 9), density, (5, 3, channels), order), tolerance=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-6)])
@pytest.mark.parametrize(("density", "order"), ORDERS[::3])
@pytest.mark.parametrize("outputs", [(), (4,)])
def test_other_precisions_and_a_float32_weight(dtype, tolerance, density, order, outputs):
    features, weight, coords = draw((7, 9), density, (5, 5, 3, *outputs), order, dtype)
    if dtype == torch.float64:
        weight = weight.detach().double().requires_grad_()
    check_against_loops(features, weight, coords, tolerance)
    out = backend.sparse_conv(features, weight, coords)
    _, grad_features, grad_weight = gradients(out, features, weight)
    assert out.dtype == grad_features.dtype == dtype and grad_weight.dtype == weight.dtype


def test_sums_are_taken_in_float32():
    """4 096 ones: a running sum in bfloat16 stops at 256, and one in float16 at 2 048."""
    features = torch.ones(1, 64 * 64, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(1, 1, 1, requires_grad=True)
    for coords in (Coordinates.full(1, (64, 64)), Coordinates(torch.arange(64 * 64).flip(0)[None], (64, 64))):
        out = backend.sparse_conv(features, weight, coords)
        assert torch.autograd.grad(out.float().sum(), weight)[0].item() == 4096


@pytest.mark.parametrize(("density", "order"), ORDERS[::2])
@pytest.mark.parametrize("kernel_size", KERNELS[1::2])
def test_full_kernel_is_the_definition(kernel_size, density, order):
    check_against_loops(*draw((7, 9), density, (*kernel_size, 3, 4), order), tolerance=1e-4)


@pytest.mark.parametrize(("density", "order"), ORDERS[::2])
def test_does_not_depend_on_threads_or_runs(density, order):
    """More points than a chunk holds, so that partial sums of several threads meet."""
    features, weight, coords = draw((50, 45), density, (7, 7, 6), order)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = backend.sparse_conv(features, weight, coords)
            results.append([out, *gradients(out, features, weight)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours, theirs)


def test_large_images_agree_with_one_tap_at_a_time():
    """Several chunks of points and rows, and a width that is no multiple of the columns taken together."""
    for order, density in (("raster", 1), ("shuffled", 1 / 3)):
        features, weight, coords = draw((45, 67), density, (5, 7, 2), order)
        image = torch.nn.functional.pad(coords.scatter(features.detach()), (3, 3, 2, 2))
        factor = 35 / neighbour_counts(coords, (5, 7))[:, :, None]
        shifted = {(i, j): coords.gather(image[:, :, i : i + 45, j : j + 67]) for i in range(5) for j in range(7)}
        expected = factor * sum(weight.detach()[tap] * values for tap, values in shifted.items())
        out = backend.sparse_conv(features, weight, coords)
        torch.testing.assert_close(out.detach(), expected, rtol=1e-4, atol=1e-3)
        grad, _, grad_weight = gradients(out, features, weight)
        for tap, values in shifted.items():
            torch.testing.assert_close(grad_weight[tap], (factor * grad * values).sum((0, 1)), rtol=1e-3, atol=0.2)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 31, 34, 37, 66, 67])
def test_weight_gradient_of_images_by_columns(width):
    """Columns are taken 32 at a time, of these four at a time, and taps three at a time."""
    image, grad = torch.randn(2, 2, 3, width, 5, dtype=torch.float64)
    for kernel_size in ((1, 1), (3, 3), (3, 5), (5, 7), (1, 11)):
        weight = torch.zeros(*kernel_size, 5, dtype=torch.float64)
        wanted = torch.nn.grad.conv2d_weight(
            image.permute(0, 3, 1, 2), (5, 1, *kernel_size), grad.permute(0, 3, 1, 2),
            padding=tuple(k // 2 for k in kernel_size), groups=5)
        found = backend.image_weight_gradient(image, grad, weight)
        torch.testing.assert_close(found, wanted[:, 0].permute(1, 2, 0))


def test_a_lone_point_sees_itself_alone():
    coords = Coordinates(torch.tensor([[40]]), (9, 9))
    features = torch.randn(1, 1, 5, requires_grad=True)
    weight = torch.randn(7, 7, 5, requires_grad=True)
    out = backend.sparse_conv(features, weight, coords)
    torch.testing.assert_close(out, 49 * weight[3, 3] * features)
    _, grad_features, grad_weight = gradients(out, features, weight)
    assert torch.isfinite(grad_features).all() and torch.isfinite(grad_weight).all()
    assert grad_weight.any(dim=2).sum() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_neighbours_and_no_further(value):
    coords = Coordinates(torch.tensor([[0, 1, 8]]), (3, 3))
    features = torch.ones(1, 3, 4)
    features[0, 0] = value
    out = backend.sparse_conv(features, torch.ones(3, 3, 4), coords)
    assert not torch.isfinite(out[0, :2]).any()
    assert torch.isfinite(out[0, 2]).all()


@pytest.mark.parametrize("outputs", [(), (4,)])
def test_operators_keep_the_rules_of_pytorch(outputs):
    features, weight, coords = draw((7, 9), 1 / 2, (3, 5, 3, *outputs), "shuffled")
    neighbours = backend._neighbours(coords, 3, 5)
    factors = torch.rand(2, *coords.index.shape)
    grad = torch.randn(*coords.index.shape, weight.shape[-1])
    check = torch.library.opcheck
    check(backend.correlate, (features, weight, *neighbours, *factors))
    arguments = features.detach(), grad, *neighbours, *factors, weight.detach()
    check(backend.correlate_weight_gradient, arguments)
    features, weight, coords = draw((7, 9), 1, (3, 5, 3, *outputs), "raster")
    image, grad = features.detach().view(2, 7, 9, 3), torch.randn(2, 7, 9, weight.shape[-1])
    check(backend.correlate_image, (image.requires_grad_(), weight, torch.ones(2, 63)))
    check(backend.image_weight_gradient, (image.detach(), grad, weight.detach()))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(("density", "order"), ORDERS[::2])
def test_compiles_without_a_graph_break(compiler, density, order):
    features, weight, coords = draw((7, 9), density, (3, 3, 4), order)
    expected = backend.sparse_conv(features, weight, coords)  # lists the neighbours, as the first step does
    compiled = torch.compile(lambda f, w: backend.sparse_conv(f, w, coords), backend=compiler, fullgraph=True)
    out = compiled(features, weight)
    assert torch.equal(out, expected)
    for ours, theirs in zip(gradients(out, features, weight), gradients(expected, features, weight), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [(), (4,)])
@pytest.mark.parametrize(("density", "order"), ORDERS[::3])
def test_autocast_changes_nothing(density, order, outputs, dtype):
    """The result has the dtype of the features, and sums are still taken in float32."""
    features, weight, coords = draw((7, 9), density, (3, 3, 4, *outputs), order, dtype)
    expected = backend.sparse_conv(features, weight, coords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = backend.sparse_conv(features, weight, coords)
        ours = gradients(out, features, weight)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    for value, theirs in zip(ours, gradients(expected, features, weight), strict=True):
        assert torch.equal(value, theirs)


def test_values_need_not_be_contiguous():
    features, weight, coords = draw((7, 9), 1 / 4, (3, 3, 4), "sorted")
    apart = features.detach().mT.contiguous().mT.requires_grad_()
    grad = torch.ones_like(features).sum().expand_as(features)
    results = []
    for values in (features, apart):
        out = backend.sparse_conv(values, weight.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0), coords)
        results.append((out, *torch.autograd.grad(out, values, grad)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("outputs", [(), (4,)])
@pytest.mark.parametrize(("density", "order"), ORDERS[::2])
def test_second_derivatives_are_right_or_refused(outputs, density, order):
    operator.check_second_derivatives(backend.sparse_conv, *draw((7, 9), density, (3, 5, 3, *outputs), order))


def test_only_wanted_gradients_are_computed(monkeypatch):
    features, weight, coords = draw((7, 9), 1 / 4, (3, 3, 4), "sorted")
    called = []
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda name, *arguments: (called.append(name), run(name, *arguments)))
    backend.sparse_conv(features, weight.detach(), coords).sum().backward()
    assert called == ["sparse_conv.neighbours", "sparse_conv.correlate", "sparse_conv.correlate"]
