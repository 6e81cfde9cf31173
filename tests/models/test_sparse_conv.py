import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.coordinates import Coordinates
from models import sparse_conv as dispatch
from models.backends import triton
from models.sparse_conv import BACKENDS, available_backends, neighbour_counts, resolve_backend, sparse_conv
from tests.reference import sparse_conv as reference
from utils.errors import UserError

CPU = torch.device("cpu")
SIZES = [(8, 8), (7, 9), (5, 12), (1, 6)]
KERNELS = [(1, 1), (3, 3), (5, 5), (7, 7), (3, 5), (7, 1)]
DENSITIES = [1, 1 / 2, 1 / 4, 1 / 8]
USABLE = [(name, kind) for name in [*available_backends(), "auto"] for kind in ("depthwise", "full")
          if name == "auto" or (getattr(BACKENDS[name], kind) and "cpu" in BACKENDS[name].devices)]


def draw(size, density, kernel_size, kind, batch=2, channels=4, dtype=torch.float32, seed=0):
    """(features, weight, coords); pixels are in no particular order."""
    generator = torch.Generator().manual_seed(seed)
    pixels = size[0] * size[1]
    order = torch.rand(batch, pixels, generator=generator).argsort(dim=1)
    coords = Coordinates(order[:, : max(1, int(pixels * density))], size)
    shape = (*kernel_size, channels) if kind == "depthwise" else (*kernel_size, channels, channels + 1)
    features = torch.randn(batch, coords.num_points, channels, generator=generator)
    return features.to(dtype), torch.randn(shape, generator=generator).to(dtype), coords


def close(actual, expected, share):
    """Whether the largest error is at most `share` of the expected root mean square."""
    expected = torch.as_tensor(expected)
    return (actual.double() - expected).abs().max() <= share * expected.square().mean().sqrt()


@pytest.mark.parametrize(("backend", "kind"), USABLE)
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_gradients_agree_with_the_loops(backend, kind, kernel_size, size):
    for density in DENSITIES:
        features, weight, coords = draw(size, density, kernel_size, kind)
        arrays = features.numpy(), weight.numpy(), coords.index.numpy(), size
        features.requires_grad_()
        weight.requires_grad_()
        out = sparse_conv(features, weight, coords, backend)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        out.backward(grad)
        grad_features, grad_weight = reference.sparse_conv_gradients(*arrays, grad.numpy())
        assert close(out, reference.sparse_conv(*arrays), 1e-4)
        assert close(features.grad, grad_features, 1e-4)
        assert close(weight.grad, grad_weight, 1e-4)


@pytest.mark.parametrize(("backend", "kind"), USABLE)
@pytest.mark.parametrize("density", [1, 1 / 4])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_close(backend, kind, density, autocast):
    features, weight, coords = draw((9, 11), density, (5, 3), kind, dtype=torch.bfloat16)
    arrays = features.float().numpy(), weight.float().numpy(), coords.index.numpy(), coords.size
    features.requires_grad_()
    weight = (weight.float() if autocast else weight).requires_grad_()  # mixed precision keeps float32 parameters
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = sparse_conv(features, weight, coords, backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    out.backward(grad)
    grad_features, grad_weight = reference.sparse_conv_gradients(*arrays, grad.float().numpy())
    assert out.dtype == features.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == weight.dtype
    assert close(out, reference.sparse_conv(*arrays), 0.05)
    assert close(features.grad, grad_features, 0.05)
    assert close(weight.grad, grad_weight, 0.05)


@pytest.mark.parametrize(("backend", "kind"), USABLE)
@pytest.mark.parametrize("size", [(16, 16), (13, 24), (40, 16)])
def test_on_every_pixel_it_is_a_convolution_corrected_at_the_border(backend, kind, size):
    features, weight, _ = draw(size, 1, (5, 5), kind)
    coords = Coordinates.full(2, size)
    out = coords.scatter(sparse_conv(features, weight, coords, backend))
    if kind == "depthwise":
        expected = F.conv2d(coords.scatter(features), weight.permute(2, 0, 1)[:, None], padding=2, groups=4)
    else:
        expected = F.conv2d(coords.scatter(features), weight.permute(3, 2, 0, 1), padding=2)
    inside = F.conv2d(torch.ones(1, 1, *size), torch.ones(1, 1, 5, 5), padding=2)
    torch.testing.assert_close(out, expected * 25 / inside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("size, taps", [((40, 50), (33, 33)), ((13, 60), (13, 91)), ((70, 9), (121, 9))])
@pytest.mark.parametrize("density", [1, 0.5])
def test_large_kernels_go_through_fourier_space(size, taps, density, dtype, tolerance):
    features, weight, coords = draw(size, density, taps, "depthwise")
    features, weight = features.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    out = sparse_conv(features, weight, coords)
    padding, kernel = [k // 2 for k in taps], weight.double().permute(2, 0, 1)[:, None]
    image = F.conv2d(coords.scatter(features.double()), kernel, padding=padding, groups=len(kernel))
    expected = coords.gather(image) * (taps[0] * taps[1] / neighbour_counts(coords, taps).double())[:, :, None]
    assert out.dtype == dtype and close(out, expected.detach().numpy(), tolerance)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual = torch.autograd.grad(out, (features, weight), grad.to(dtype))
    for one, other in zip(actual, torch.autograd.grad(expected, (features, weight), grad), strict=True):
        assert close(one, other.double().numpy(), 2 * tolerance)


@pytest.mark.parametrize(("backend", "kind"), USABLE)
def test_order_of_the_points_and_the_rest_of_the_batch_do_not_matter(backend, kind):
    features, weight, coords = draw((9, 7), 0.5, (3, 3), kind)
    out = sparse_conv(features, weight, coords, backend)
    order = torch.randperm(coords.num_points, generator=torch.Generator().manual_seed(1))
    shuffled = sparse_conv(features[:, order], weight, Coordinates(coords.index[:, order], coords.size), backend)
    torch.testing.assert_close(shuffled, out[:, order])
    alone = sparse_conv(features[1:], weight, Coordinates(coords.index[1:], coords.size), backend)
    torch.testing.assert_close(alone, out[1:])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel_size", [*KERNELS, (15, 27)])
def test_neighbour_counts_are_the_exact_integers(size, kernel_size):
    for density in DENSITIES:
        _, _, coords = draw(size, density, (1, 1), "depthwise")
        with torch.autocast("cpu", torch.bfloat16):
            counts = neighbour_counts(coords, kernel_size)
        assert counts.dtype == torch.float32
        assert np.array_equal(counts.numpy(), reference.neighbour_counts(coords.index.numpy(), size, kernel_size))


def test_neighbour_counts_above_256_survive_bfloat16():
    coords = Coordinates.full(1, (40, 40))
    with torch.autocast("cpu", torch.bfloat16):
        assert neighbour_counts(coords, (27, 27)).view(40, 40)[20, 20] == 27 * 27


def test_neighbour_counts_are_computed_once():
    _, _, coords = draw((8, 8), 0.5, (1, 1), "depthwise")
    assert neighbour_counts(coords, (3, 5)) is neighbour_counts(coords, (3, 5))
    assert neighbour_counts(coords, (3, 5)) is not neighbour_counts(coords, (5, 3))


def test_backends():
    available = available_backends()
    assert "torch_dense" in available and set(available) <= set(BACKENDS)
    assert resolve_backend("auto", CPU, depthwise=False) == "torch_dense"
    assert resolve_backend("auto", CPU, depthwise=True) == ("numba" if "numba" in available else "torch_dense")
    assert resolve_backend("torch_dense", CPU, depthwise=True) == "torch_dense"


@pytest.mark.parametrize("name", sorted({*BACKENDS, "cudnn"} - {"torch_dense", "numba"}))
def test_a_backend_that_cannot_be_used_is_refused_with_what_can(name):
    features, weight, coords = draw((4, 4), 1, (3, 3), "depthwise")
    usable = name in available_backends() and BACKENDS[name].depthwise and "cpu" in BACKENDS[name].devices
    if usable:
        pytest.skip(f"{name} runs here")
    with pytest.raises(UserError, match=rf"model\.backend='{name}'.*auto.*torch_dense"):
        sparse_conv(features, weight, coords, name)


def test_a_backend_for_another_kernel_or_device_is_refused():
    with pytest.raises(UserError, match=r"model\.backend='spconv'.*no depthwise kernels.*torch_dense"):
        resolve_backend("spconv", torch.device("cuda"), depthwise=True)
    with pytest.raises(UserError, match="model.backend='numba'.*cuda"):
        resolve_backend("numba", torch.device("cuda"), depthwise=True)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4), (3, 3, 5), (3, 3)])
def test_wrong_shapes_are_refused(shape):
    features, _, coords = draw((4, 4), 1, (1, 1), "depthwise")
    with pytest.raises(ValueError, match="weight"):
        sparse_conv(features, torch.zeros(shape), coords)
    with pytest.raises(ValueError, match="features"):
        sparse_conv(features[:, 1:], torch.zeros(3, 3, 4), coords)


@pytest.mark.skipif(torch.cuda.is_available() or "triton" in available_backends(), reason="Triton works here")
def test_a_gpu_where_triton_cannot_start_kernels_takes_torch_dense(monkeypatch, caplog):
    """As on a machine without a C compiler: with no GPU, Triton's first attempt fails as well."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    caches = [dispatch._unavailable_reason, triton.unavailable_reason, triton._driver_problem]
    for cache in caches:
        cache.cache_clear()
    try:
        assert resolve_backend("auto", torch.device("cuda"), depthwise=True) == "torch_dense"
        assert "slower torch_dense" in caplog.text
        with pytest.raises(UserError, match="C compiler"):
            resolve_backend("triton", torch.device("cuda"), depthwise=True)
    finally:
        for cache in caches:
            cache.cache_clear()
