import functools
import sys

import pytest
import torch

from data.coordinates import Coordinates
from models.backends import spconv as backend
from models.sparse_conv import resolve_backend, sparse_conv
from tests.models import operator
from tests.models.operator import draw, gradients
from utils.errors import UserError

needs_spconv = pytest.mark.skipif(not backend.is_available(), reason=backend.unavailable_reason())
check_against_loops = functools.partial(operator.check_against_loops, backend.sparse_conv)


@needs_spconv
@pytest.mark.parametrize(("density", "order"), [(1, "raster"), (1, "shuffled"), (1 / 2, "sorted"), (1 / 8, "shuffled")])
@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3), (7, 7), (3, 7)])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 6)])
def test_is_the_definition(size, kernel_size, density, order):
    check_against_loops(*draw(size, density, (*kernel_size, 5, 4), order), tolerance=1e-4)


@needs_spconv
def test_a_lone_point_sees_itself_alone():
    coords = Coordinates(torch.tensor([[40]]), (9, 9))
    check_against_loops(torch.randn(1, 1, 5).requires_grad_(), torch.randn(7, 7, 5, 3).requires_grad_(), coords, 1e-4)


@needs_spconv
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_widened(dtype, tolerance, autocast):
    features, weight, coords = draw((7, 9), 1 / 2, (5, 5, 3, 4), "shuffled", dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, grad_features, grad_weight = check_against_loops(features, weight, coords, tolerance)
    assert out.dtype == grad_features.dtype == dtype and grad_weight.dtype == torch.float32


@needs_spconv
def test_many_points_and_threads_agree_with_a_dense_convolution():
    features, weight, coords = draw((48, 50), 1 / 3, (7, 7, 16, 16), "shuffled")
    results = []
    for name in ("torch_dense", "spconv", "spconv"):
        out = sparse_conv(features, weight, coords, name)
        results.append((out, *gradients(out, features, weight)))
    for ours in results[1:]:
        for value, theirs in zip(ours, results[0], strict=True):
            torch.testing.assert_close(value, theirs, rtol=1e-4, atol=1e-3)


def test_depthwise_kernels_are_refused():
    with pytest.raises(UserError, match=r"model\.backend='spconv'.*no depthwise kernels.*auto, torch_dense"):
        resolve_backend("spconv", torch.device("cpu"), depthwise=True)


def test_what_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)  # as if it were not installed
    assert "pip install spconv-cu126" in backend.unavailable_reason()
    assert not backend.is_available()
