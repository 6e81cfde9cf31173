"""The operator K: every backend that runs on a CPU against its definition, and the choice between backends."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.coordinates import Coordinates
from models.kernels import BACKENDS, cpu, gpu, spconv
from models.sparse_conv import available_backends, neighbour_counts, resolve_backend, sparse_conv
from tests.models.operator import check_against_loops, check_second_derivatives, draw, results
from tests.reference import sparse_conv as reference
from utils.device import triton_problem
from utils.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = [(8, 8), (7, 9), (5, 12), (1, 6)]
KERNELS = [(1, 1), (3, 3), (7, 7), (3, 5), (7, 1)]
ORDERS = [(1, "raster"), (1 / 2, "sorted"), (1 / 4, "shuffled"), (1 / 8, "sorted"), (1, "shuffled")]
KINDS = {"depthwise": (), "full": (4,)}  # outputs of the weight
USABLE = [pytest.param(name, outputs, id=f"{name}-{kind}")
          for name in ("torch_dense", *BACKENDS) for kind, outputs in KINDS.items()
          if name in available_backends() and (name == "torch_dense" or "cpu" in BACKENDS[name].devices)
          and (kind == "full" or name == "torch_dense" or BACKENDS[name].depthwise)]
needs_numba = pytest.mark.skipif("numba" not in available_backends(), reason="numba is not installed")


def operator(backend, consistent=False):
    return lambda features, weight, coords: sparse_conv(features, weight, coords, backend, consistent)


@pytest.mark.parametrize(("backend", "outputs"), USABLE)
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_forward_and_gradients_are_the_definition(backend, outputs, kernel_size):
    for number, size in enumerate(SIZES):
        for density, order in ORDERS[number % 2 :: 2]:
            shape = (*kernel_size, (3, 33, 1, 8)[number], *outputs)
            check_against_loops(operator(backend), *draw(size, density, shape, order), 1e-4)


@pytest.mark.parametrize(("backend", "outputs"), USABLE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_the_consistent_estimate_is_its_definition(backend, outputs, dtype, tolerance):
    for density, order in (*ORDERS[:4], (0, "sorted")):  # the last one: one point, alone
        problem = draw((7, 9), density, (5, 3, 3, *outputs), order, dtype)
        check_against_loops(operator(backend, consistent=True), *problem, tolerance, consistent=True)
    single = draw((7, 9), 1 / 2, (1, 1, 3, *outputs), "sorted")
    check_against_loops(operator(backend, consistent=True), *single, 1e-4, consistent=True)


@pytest.mark.parametrize("share", [1, 1 / 2, 1 / 4, 1 / 8])
def test_every_tap_has_the_same_mean_weight_at_every_share_of_the_pixels(share):
    """The mean response to one pixel over many subsets, at each point around it that is present."""
    draws, size, generator = 4000, (13, 13), torch.Generator().manual_seed(0)
    coords = Coordinates.random(draws, size, round(share * 169), generator=generator)
    impulse = torch.zeros(draws, 1, *size)
    impulse[:, :, 6, 6] = 1  # the windows of all its neighbours lie in the image
    present = coords.scatter(torch.ones(draws, coords.num_points, 1)).sum(0)[0, 3:10, 3:10]

    def response(consistent):
        out = coords.scatter(sparse_conv(coords.gather(impulse), torch.ones(7, 7, 1), coords, consistent=consistent))
        mean = out.sum(0)[0, 3:10, 3:10] / present
        return mean, (out.square().sum(0)[0, 3:10, 3:10] / present - mean.square()).clamp(min=0).sqrt() / present.sqrt()

    mean, error = response(consistent=True)
    assert ((mean - 1).abs() <= 4 * error + 1e-5).all() and abs(mean.mean() - 1) < 0.05
    assert response(consistent=False)[0][3, 3] >= 1 / (1 / 49 + share * 48 / 49) - 1e-5  # 1, 1.96, 3.77, 7.0


def test_the_consistent_estimate_of_all_pixels_is_a_convolution_away_from_the_border():
    features, weight, coords = draw((16, 12), 1, (5, 3, 4), "raster")
    expected = F.conv2d(coords.scatter(features), weight.permute(2, 0, 1)[:, None], groups=4)
    out = coords.scatter(sparse_conv(features, weight, coords, consistent=True))
    torch.testing.assert_close(out[..., 2:-2, 1:-1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "outputs"), USABLE)
@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.bfloat16, 0.05), (torch.float16, 0.01), pytest.param(torch.float64, 1e-12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_precision_with_weights_in_float32(backend, outputs, dtype, tolerance, autocast):
    if backend == "torch_dense" and autocast and dtype != torch.bfloat16:
        pytest.skip("autocast converts a plain convolution to bfloat16")
    for density, order in ORDERS[::2]:
        features, weight, coords = draw((9, 11), density, (5, 3, 3, *outputs), order, dtype)
        if dtype == torch.float64:
            weight = weight.detach().double().requires_grad_()
        function = torch.autocast("cpu", torch.bfloat16, enabled=autocast)(operator(backend))
        check_against_loops(function, features, weight, coords, tolerance)


@pytest.mark.parametrize(("backend", "outputs"), USABLE)
@pytest.mark.parametrize("size", [(16, 16), (13, 24)])
def test_on_every_pixel_it_is_a_convolution_corrected_at_the_border(backend, outputs, size):
    features, weight, coords = (one.detach() if isinstance(one, torch.Tensor) else one
                                for one in draw(size, 1, (5, 5, 4, *outputs), "raster"))
    kernel = weight[..., None, :] if not outputs else weight
    kernel = weight.permute(2, 0, 1)[:, None] if not outputs else kernel.permute(3, 2, 0, 1)
    expected = F.conv2d(coords.scatter(features), kernel, padding=2, groups=1 if outputs else 4)
    inside = F.conv2d(torch.ones(1, 1, *size), torch.ones(1, 1, 5, 5), padding=2)
    with torch.no_grad():
        out = sparse_conv(features, weight, coords, backend)
    torch.testing.assert_close(coords.scatter(out), expected * 25 / inside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "outputs"), USABLE)
def test_order_of_the_points_batch_and_strides_do_not_matter(backend, outputs):
    features, weight, coords = draw((9, 7), 0.5, (3, 3, 4, *outputs), "sorted")
    out = sparse_conv(features, weight, coords, backend)
    order = torch.randperm(coords.num_points, generator=torch.Generator().manual_seed(1))
    shuffled = Coordinates(coords.index[:, order].T.contiguous().T, coords.size)
    strided = features[:, order].mT.contiguous().mT
    torch.testing.assert_close(sparse_conv(strided, weight, shuffled, backend), out[:, order])
    alone = sparse_conv(features[1:], weight, Coordinates(coords.index[1:], coords.size), backend)
    torch.testing.assert_close(alone, out[1:])


@pytest.mark.parametrize(("backend", "outputs"), USABLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_neighbours_and_no_further(backend, outputs, value):
    if backend == "torch_dense" and outputs:
        pytest.skip("a matrix product spreads NaN over the image")
    coords = Coordinates(torch.tensor([[0, 1, 8]]), (3, 3))
    features = torch.ones(1, 3, 4)
    features[0, 0] = value
    out = sparse_conv(features, torch.ones(3, 3, 4, *outputs), coords, backend)
    assert not torch.isfinite(out[0, :2]).any()
    assert torch.isfinite(out[0, 2]).all()


@pytest.mark.parametrize(("backend", "outputs"), [one for one in USABLE if one.values[0] != "spconv"])
def test_second_derivatives_are_those_of_the_dense_form(backend, outputs):
    for density, order in ORDERS[:3]:
        problem = draw((7, 9), density, (3, 5, 3, *outputs), order)
        check_second_derivatives(operator(backend), operator("torch_dense"), problem, ("features", "weight", "grad"))


@needs_numba
@pytest.mark.parametrize(("density", "order"), ORDERS[:3])
def test_the_loops_do_not_depend_on_threads_or_runs(density, order):
    """More points than a chunk has, so that partial sums of several threads meet."""
    problem, found, before = draw((50, 45), density, (7, 7, 6), order), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(results(operator("numba"), *problem))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))
    for ours, theirs in zip(found[0], results(operator("torch_dense"), *problem), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@needs_numba
def test_the_loops_sum_in_float32():
    """4,096 ones: a running sum in bfloat16 stops at 256, and one in float16 at 2,048."""
    features, weight = torch.ones(1, 64 * 64, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, requires_grad=True)
    for coords in (Coordinates.full(1, (64, 64)), Coordinates(torch.arange(64 * 64).flip(0)[None], (64, 64))):
        out = sparse_conv(features, weight, coords, "numba")
        assert torch.autograd.grad(out.float().sum(), weight)[0].item() == 4096


@needs_numba
@pytest.mark.slow
def test_the_operators_of_the_loops_keep_the_rules_of_pytorch():
    features, weight, coords = draw((7, 9), 1 / 2, (3, 5, 3), "shuffled")
    table = F.pad(coords.table.unflatten(1, (7, 9)), (2, 2, 1, 1), value=-1)
    torch.library.opcheck(torch.ops.infty_diff.numba_nearest_pixels.default, (coords.table, 7, 9, 4, 3, 10))
    # Memory beyond the listed pairs is not initialised, so only the start of the lists can be compared.
    assert torch.equal(*(torch.ops.infty_diff.numba_list_neighbours(coords.index, table, 3, 5)[0] for _ in range(2)))
    geometry = cpu._neighbours(coords, 3, 5)
    torch.library.opcheck(torch.ops.infty_diff.numba_neighbour_sum.default, (features, weight, geometry))
    grad = torch.randn(2, 31, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.infty_diff.numba_neighbour_sum_weight_gradient.default,
                          (features, grad, weight, geometry))


@pytest.mark.parametrize(("size", "taps", "density", "dtype", "tolerance"), [
    ((40, 50), (33, 33), 1, torch.float32, 1e-4), ((40, 50), (33, 33), 1 / 2, torch.bfloat16, 0.03),
    ((13, 60), (13, 91), 1 / 2, torch.float32, 1e-4), ((70, 9), (121, 9), 1 / 2, torch.float64, 1e-12)])
def test_large_kernels_go_through_fourier_space(size, taps, density, dtype, tolerance):
    features, weight, coords = draw(size, density, (*taps, 3), "sorted", dtype)
    if dtype == torch.float64:
        weight = weight.detach().double().requires_grad_()
    padding, kernel = [k // 2 for k in taps], weight.double().permute(2, 0, 1)[:, None]
    image = F.conv2d(coords.scatter(features.double()), kernel, padding=padding, groups=3)
    expected = coords.gather(image) * (taps[0] * taps[1] / neighbour_counts(coords, taps).double())[:, :, None]
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for out in (sparse_conv(features, weight, coords), expected):
        found.append([out, *torch.autograd.grad(out, (features, weight), grad.to(out.dtype))])
    for ours, theirs in zip(*found, strict=True):
        assert (ours.double() - theirs).abs().max() <= 2 * tolerance * theirs.double().square().mean().sqrt()


@pytest.mark.parametrize("size", SIZES)
def test_neighbour_counts_are_the_exact_integers(size):
    for kernel_size in (*KERNELS, (15, 27)):
        for density, order in ORDERS:
            _, _, coords = draw(size, density, (1, 1, 1), order)
            with torch.autocast("cpu", torch.bfloat16):
                counts = neighbour_counts(coords, kernel_size)
            assert np.array_equal(counts.numpy(), reference.neighbour_counts(coords.index.numpy(), size, kernel_size))
    assert neighbour_counts(Coordinates.full(1, (40, 40)), (27, 27)).view(40, 40)[20, 20] == 27 * 27


def test_the_choice_of_a_backend():
    available = available_backends()
    assert available[0] == "torch_dense" and set(available[1:]) <= set(BACKENDS)
    assert resolve_backend("auto", CPU, depthwise=True) == ("numba" if "numba" in available else "torch_dense")
    assert resolve_backend("torch_dense", CUDA, depthwise=True) == "torch_dense"


@pytest.mark.parametrize(("name", "device", "message"), [
    ("cudnn", CPU, "is not one of auto, torch_dense, numba, triton, torchsparse, spconv"),
    ("numba", CUDA, "the model is on cuda, and it runs on cpu; usable here: auto, torch_dense"),
    ("spconv", CPU, "no depthwise kernels.*usable here: auto, torch_dense"),
    ("torchsparse", CPU, "runs on cuda; usable here: auto, torch_dense"),
])
def test_a_backend_that_cannot_be_used_is_refused_with_those_that_can(name, device, message):
    with pytest.raises(UserError, match=f"model.backend='{name}' .*{message}"):
        resolve_backend(name, device, depthwise=True)


@pytest.mark.parametrize(("module", "backend", "hint"), [
    ("numba", cpu, "pip install numba"), ("spconv.pytorch", spconv, "pip install spconv-cu126")])
def test_what_to_install_is_named(monkeypatch, module, backend, hint):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    reason = getattr(backend.unavailable_reason, "__wrapped__", backend.unavailable_reason)
    assert hint in reason(depthwise=False)


@pytest.mark.skipif(torch.cuda.is_available() or gpu.INTERPRETED, reason="Triton works here")
def test_a_gpu_on_which_triton_cannot_start_kernels_uses_torch_dense(monkeypatch, caplog):
    """As on a machine without a C compiler: without a GPU, Triton's first attempt also fails."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    triton_problem.cache_clear()
    try:
        assert resolve_backend("auto", CUDA, depthwise=True) == "torch_dense"
        assert "slower torch_dense" in caplog.text
        with pytest.raises(UserError, match="C compiler"):
            resolve_backend("triton", CUDA, depthwise=True)
    finally:
        triton_problem.cache_clear()


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4), (3, 3, 5), (3, 3)])
def test_wrong_shapes_are_refused(shape):
    features, _, coords = draw((4, 4), 1, (1, 1, 4), "sorted")
    with pytest.raises(ValueError, match="weight"):
        sparse_conv(features, torch.zeros(shape), coords)
    with pytest.raises(ValueError, match="features"):
        sparse_conv(features[:, 1:], torch.zeros(3, 3, 4), coords)
