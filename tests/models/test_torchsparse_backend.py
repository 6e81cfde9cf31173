"""Against stand-ins of torchsparse's interfaces, whose conv3d sums up the definition of their kernels literally."""

import functools
import itertools
import sys
import types

import pytest
import torch

from models import sparse_conv as dispatch
from models.backends import torchsparse as backend
from tests.models import operator
from tests.models.operator import draw
from utils.errors import UserError

CUDA = torch.device("cuda")


class Tensor:
    """What both kinds of SparseTensor share."""

    def __init__(self, feats, coords, stride=1):
        assert coords.dtype == torch.int32 and coords.is_contiguous() and coords.shape == (len(feats), 4)
        self.feats, self.coords = feats, coords


class OldTensor(Tensor):
    """Up to 2.0: [x, y, z, image]."""

    def __init__(self, feats, coords, stride=1):
        super().__init__(feats, coords, stride)
        self.cmaps, self.kmaps = {}, {}


class NewTensor(Tensor):
    """2.1: [image, x, y, z]."""

    def __init__(self, feats, coords, stride=1, spatial_range=None):
        super().__init__(feats, coords, stride)
        self._caches = types.SimpleNamespace(kmaps={})


def make_maps(tensor, kernel_size, built):
    """The (point, neighbour) pairs of each tap: for kernels of an odd volume, the first axis changes fastest."""
    maps = tensor.kmaps if isinstance(tensor, OldTensor) else tensor._caches.kmaps
    if kernel_size not in maps:
        built.append(kernel_size)
        image_first = isinstance(tensor, NewTensor)
        keys = [(row[0], row[1:]) if image_first else (row[3], row[:3]) for row in map(tuple, tensor.coords.tolist())]
        place = {key: i for i, key in enumerate(keys)}
        x, y, z = (range(-(k // 2), k // 2 + 1) for k in kernel_size)
        maps[kernel_size] = [
            [(i, place[image, (a + dx, b + dy, c + dz)]) for (image, (a, b, c)), i in place.items()
             if (image, (a + dx, b + dy, c + dz)) in place]
            for dz, dy, dx in itertools.product(z, y, x)
        ]
    return maps[kernel_size]


def conv(tensor, weight, kernel_size, built, depthwise=False):
    out = tensor.feats.new_zeros(len(tensor.feats), weight.shape[-1])
    for kernel, pairs in zip(weight, make_maps(tensor, kernel_size, built), strict=True):
        for i, j in pairs:
            value = tensor.feats[j] * kernel if depthwise else tensor.feats[j] @ kernel
            out = out.index_add(0, torch.tensor([i]), value[None])
    return types.SimpleNamespace(feats=out)


@pytest.fixture(params=["fork", "2.0", "2.1", "swapped", "broken"])
def interface(request, monkeypatch):
    """The stand-in, installed; it lists the maps that it makes."""
    built = []

    def fork(input, weight, kernel_size, bias=None, stride=1, dilation=1, transposed=False, depthwise=False):
        return conv(input, weight, kernel_size, built, depthwise)

    def old(input, weight, kernel_size, bias=None, stride=1, dilation=1, transposed=False):
        return conv(input, weight, kernel_size, built)

    def new(input, weight, kernel_size, bias=None, stride=1, padding=0, dilation=1, config=None, transposed=False,
            generative=False, training=False):
        assert training
        return conv(input, weight, kernel_size, built)

    def swapped(input, weight, kernel_size):
        return conv(input, weight.flip(0), kernel_size, built)

    def broken(input, weight):
        raise AssertionError

    functions = {"fork": fork, "2.0": old, "2.1": new, "swapped": swapped, "broken": broken}
    functional = types.SimpleNamespace(conv3d=functions[request.param])
    package = types.SimpleNamespace(SparseTensor=NewTensor if request.param == "2.1" else OldTensor)
    for name, module in [("", package), (".nn", types.SimpleNamespace()), (".nn.functional", functional)]:
        monkeypatch.setitem(sys.modules, f"torchsparse{name}", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "DEVICE", "cpu")
    dispatch._unavailable_reason.cache_clear()
    yield types.SimpleNamespace(name=request.param, built=built)
    dispatch._unavailable_reason.cache_clear()


only = functools.partial(pytest.mark.parametrize, "interface", indirect=True)
check_against_loops = functools.partial(operator.check_against_loops, backend.sparse_conv)


@only(["fork", "2.0", "2.1"])
@pytest.mark.parametrize(("kernel_size", "density", "order"), [
    ((3, 3), 1 / 2, "shuffled"), ((3, 5), 1 / 3, "sorted"), ((7, 3), 1, "shuffled"), ((1, 1), 1 / 2, "sorted"),
])  # fmt: skip
def test_is_the_definition(interface, kernel_size, density, order):
    check_against_loops(*draw((5, 6), density, (*kernel_size, 3, 4), order), tolerance=1e-4)
    if interface.name == "fork":
        check_against_loops(*draw((5, 6), density, (*kernel_size, 3), order), tolerance=1e-4)


@only(["fork", "2.1"])
def test_the_result_has_the_dtype_of_the_features(interface):
    features, weight, coords = draw((4, 5), 1 / 2, (3, 3, 3, 4), "sorted", torch.bfloat16)
    check_against_loops(features, weight, coords, tolerance=0.05)
    assert backend.sparse_conv(features, weight, coords).dtype == torch.bfloat16


@only(["2.0", "2.1"])
def test_maps_are_made_once_for_each_geometry_and_kernel_size(interface):
    features, weight, coords = draw((4, 5), 1 / 2, (3, 3, 3, 4), "sorted")
    for _ in range(2):
        backend.sparse_conv(features, weight, coords)
        backend.sparse_conv(features, weight[:, :1], coords)
    assert interface.built == [(1, 3, 3), (1, 3, 1)]


@only(["fork", "2.0", "2.1"])
def test_depthwise_is_offered_where_it_is(interface):
    assert dispatch.resolve_backend("torchsparse", CUDA, depthwise=False) == "torchsparse"
    assert "torchsparse" in dispatch.available_backends()
    if interface.name == "fork":
        assert dispatch.resolve_backend("torchsparse", CUDA, depthwise=True) == "torchsparse"
    else:
        with pytest.raises(UserError, match="no depthwise kernels, the fork .* does; use model.backend=triton"):
            dispatch.resolve_backend("torchsparse", CUDA, depthwise=True)


@only(["swapped", "broken"])
def test_what_does_not_compute_the_operator_is_refused(interface):
    message = {"swapped": "computes something else", "broken": "fails on a small example"}[interface.name]
    with pytest.raises(UserError, match=f"model.backend='torchsparse'.*{message}.*triton"):
        dispatch.resolve_backend("torchsparse", CUDA, depthwise=False)


def test_what_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsparse.nn.functional", None)  # as if it were not installed
    assert "samb-t/torchsparse from source, or use model.backend=triton" in backend.unavailable_reason()


@only(["2.0"])
def test_it_needs_a_gpu(interface, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in backend.unavailable_reason()
    with pytest.raises(UserError, match="model.backend='torchsparse'.*runs on cuda"):
        dispatch.resolve_backend("torchsparse", torch.device("cpu"), depthwise=False)
