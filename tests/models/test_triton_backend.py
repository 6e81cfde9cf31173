"""Run on a GPU, or with TRITON_INTERPRET=1 on CPU, which test_triton_kernels.py does in a process of its own."""

import functools

import pytest
import torch

from data.coordinates import Coordinates
from models.backends import torch_dense
from models.backends import triton as backend
from models.sparse_conv import AUTO, INTERPRETED, resolve_backend, sparse_conv
from tests.models import operator
from tests.models.operator import gradients

if not backend.is_available():
    pytest.skip(backend.unavailable_reason(), allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
draw = functools.partial(operator.draw, device=DEVICE)
check_against_loops = functools.partial(operator.check_against_loops, backend.sparse_conv)
KINDS = [(), (6,)]  # depthwise, and full with 6 outputs
# size, kernel size, density, order of the points: every size, kernel and density at least once
GEOMETRIES = [
    ((4, 7), (7, 7), 1 / 2, "sorted"),
    ((3, 5), (5, 5), 1, "raster"),
    ((9, 6), (3, 7), 1 / 4, "shuffled"),
    ((12, 5), (1, 1), 1 / 8, "sorted"),
    ((1, 6), (7, 3), 1, "shuffled"),
    ((11, 9), (3, 3), 0, "sorted"),  # one point
    ((7, 8), (3, 3), 1 / 2, "shuffled"),
]


@pytest.mark.parametrize(("size", "kernel_size", "density", "order"), GEOMETRIES)
@pytest.mark.parametrize("outputs", KINDS)
def test_is_the_definition(outputs, size, kernel_size, density, order):
    check_against_loops(*draw(size, density, (*kernel_size, 5, *outputs), order), tolerance=1e-4)


@pytest.mark.parametrize("channels", [(1,), (70,), (1, 1), (33, 3), (16, 70)])
def test_any_number_of_channels(channels):
    """Fewer than a block holds, several blocks, and neither a power of two."""
    check_against_loops(*draw((6, 7), 1 / 3, (1, 3, *channels), "sorted"), tolerance=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.08), (torch.float16, 0.01)])
@pytest.mark.parametrize("outputs", KINDS)
def test_half_precision_and_a_float32_weight(dtype, tolerance, outputs):
    features, weight, coords = draw((4, 5), 1 / 2, (3, 3, 5, *outputs), "shuffled", dtype)
    for other in (weight, weight.detach().to(dtype).requires_grad_()):
        out, grad_features, grad_weight = check_against_loops(features, other, coords, tolerance)
        assert out.dtype == grad_features.dtype == dtype and grad_weight.dtype == other.dtype


@pytest.mark.parametrize("outputs", KINDS)
def test_parts_of_the_points_are_added_up(outputs, monkeypatch):
    """Several blocks of points to a part and several parts, the last one incomplete."""
    monkeypatch.setattr(backend, "PARTS", {"depthwise": 3, "full": 3})
    monkeypatch.setattr(backend, "POINTS", 16)
    monkeypatch.setattr(backend, "SIDE", {2: 16, 4: 16})
    check_against_loops(*draw((7, 11), 1 / 2, (1, 3, 5, *outputs), "sorted"), tolerance=1e-4)


@pytest.mark.parametrize("outputs", KINDS)
def test_coordinates_of_any_strides(outputs):
    features, weight, coords = draw((6, 7), 1 / 2, (3, 5, 4, *outputs), "shuffled")
    apart = Coordinates(coords.index.T.contiguous().T, coords.size)
    assert not apart.index.is_contiguous()
    check_against_loops(features, weight, apart, tolerance=1e-4)


def test_sums_are_taken_in_float32(monkeypatch):
    """2 303 ones: a running sum in bfloat16 stops at 256, and one in float16 at 2 048."""
    monkeypatch.setattr(backend, "POINTS", 1024)
    monkeypatch.setattr(backend, "SIDE", {2: 1024, 4: 1024})
    coords = Coordinates(torch.arange(47 * 49, device=DEVICE).flip(0)[None], (47, 49))
    features = torch.ones(1, 47 * 49, 1, dtype=torch.float16, device=DEVICE)
    for weight in (torch.ones(1, 1, 1, device=DEVICE), torch.ones(1, 1, 1, 1, device=DEVICE)):
        out = backend.sparse_conv(features, weight.requires_grad_(), coords)
        assert torch.autograd.grad(out.float().sum(), weight)[0].item() == 2303


def test_counts_do_not_take_half_precision_beyond_its_range():
    """A lone point has the factor 9, but dividing and multiplying by it must not leave what float16 holds."""
    coords = Coordinates(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), (1, 1))
    features = torch.ones(1, 1, 4, dtype=torch.float16, device=DEVICE, requires_grad=True)
    weight = torch.full((3, 3, 4, 4), 1 / (9 * 4), device=DEVICE)
    out = backend.sparse_conv(features, weight, coords)
    grad = torch.full_like(out, 20000.0)
    torch.testing.assert_close(torch.autograd.grad(out, features, grad)[0], grad, rtol=1e-3, atol=0)


@pytest.mark.parametrize("outputs", KINDS)
def test_the_same_input_gives_the_same_bits(outputs):
    features, weight, coords = draw((7, 8), 1 / 2, (3, 1, 5, *outputs), "sorted")
    outs = [backend.sparse_conv(features, weight, coords) for _ in range(2)]
    for ours, theirs in zip(*[(out, *gradients(out, features, weight)) for out in outs], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("outputs", KINDS)
def test_nan_and_infinity_reach_the_neighbours_and_no_further(value, outputs):
    coords = Coordinates(torch.tensor([[0, 1, 8]], device=DEVICE), (3, 3))
    features = torch.ones(1, 3, 4, device=DEVICE)
    features[0, 0] = value
    out = backend.sparse_conv(features, torch.ones(3, 3, 4, *outputs, device=DEVICE), coords)
    assert not torch.isfinite(out[0, :2]).any()
    assert torch.isfinite(out[0, 2]).all()


@pytest.mark.parametrize("outputs", KINDS)
def test_operators_keep_the_rules_of_pytorch(outputs):
    features, weight, coords = draw((2, 5), 1 / 2, (1, 3, 3, *outputs), "shuffled")
    geometry = backend._geometry(coords, *weight.shape[:2])
    grad = torch.randn(2, 5, weight.shape[-1], device=DEVICE)
    rules = "test_schema", "test_autograd_registration", "test_faketensor"  # and the next test's
    check = functools.partial(torch.library.opcheck, test_utils=rules)
    for values, adjoint in ((features, False), (grad.clone().requires_grad_(), True)):
        check(backend.correlate, (values, weight, *geometry, adjoint))
    check(backend.correlate_weight_gradient, (features.detach(), grad, *geometry, weight.detach()))


@pytest.mark.parametrize("outputs", KINDS)
def test_compiles_without_a_graph_break(outputs):
    features, weight, coords = draw((5, 5), 1 / 2, (3, 1, 4, *outputs), "sorted")
    expected = backend.sparse_conv(features, weight, coords)
    compiled = torch.compile(lambda f, w: backend.sparse_conv(f, w, coords), backend="aot_eager", fullgraph=True)
    out = compiled(features, weight)
    assert torch.equal(out, expected)
    for ours, theirs in zip(gradients(out, features, weight), gradients(expected, features, weight), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("outputs", KINDS)
def test_autocast_and_strides_change_nothing(outputs):
    features, weight, coords = draw((5, 6), 1 / 2, (3, 1, 4, *outputs), "sorted")
    expected = backend.sparse_conv(features, weight, coords)
    apart = features.detach().mT.contiguous().mT.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = backend.sparse_conv(apart, weight, coords)
        ours = gradients(out, apart, weight)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    for value, theirs in zip(ours, gradients(expected, features, weight), strict=True):
        assert torch.equal(value, theirs)


@pytest.mark.parametrize("outputs", KINDS)
def test_only_wanted_gradients_are_computed(outputs, monkeypatch):
    features, weight, coords = draw((4, 4), 1 / 2, (1, 3, 4, *outputs), "sorted")
    monkeypatch.setattr(backend, "correlate_weight_gradient", None)
    backend.sparse_conv(features, weight.detach(), coords).sum().backward()
    assert features.grad is not None
    monkeypatch.undo()
    out = backend.sparse_conv(features.detach(), weight, coords)
    monkeypatch.setattr(backend, "correlate", None)
    out.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("outputs", KINDS)
def test_second_derivatives_are_right_or_refused(outputs):
    problem = draw((5, 6), 1 / 2, (3, 1, 4, *outputs), "sorted")
    operator.check_second_derivatives(backend.sparse_conv, *problem)


def test_float64_is_not_rounded():
    features, weight, coords = draw((5, 6), 1 / 2, (3, 3, 4), "sorted", torch.float64)
    out = sparse_conv(features, weight.double(), coords, "triton")
    assert torch.equal(out, torch_dense.sparse_conv(features, weight.double(), coords))


def test_it_is_the_default_of_a_gpu():
    for kind in AUTO:
        assert resolve_backend("auto", torch.device("cuda"), kind == "depthwise") == "triton"
