"""The torchsparse backend with stand-ins for the package's interfaces, whose conv3d is the literal definition."""

import functools
import itertools
import sys
import types
from dataclasses import replace

import pytest
import torch

from models.kernels import BACKENDS, torchsparse
from models.sparse_conv import available_backends, resolve_backend, sparse_conv
from tests.models.operator import check_against_loops, draw
from utils.errors import UserError

CUDA = torch.device("cuda")
conv = functools.partial(sparse_conv, backend="torchsparse")


class OldTensor:
    """Up to 2.0: coordinates [x, y, z, image]."""

    def __init__(self, feats, coords):
        assert coords.dtype == torch.int32 and coords.is_contiguous() and coords.shape == (len(feats), 4)
        self.feats, self.coords = feats, coords
        self.cmaps, self.kmaps = {}, {}


class NewTensor(OldTensor):
    """2.1: coordinates [image, x, y, z]."""

    def __init__(self, feats, coords):
        super().__init__(feats, coords.roll(-1, dims=1).contiguous())
        del self.cmaps, self.kmaps
        self._caches = types.SimpleNamespace(kmaps={})


def make_maps(tensor, kernel_size, built):
    """The (point, neighbour) pairs of each tap. In kernels of an odd volume, the first axis changes fastest."""
    maps = tensor.kmaps if hasattr(tensor, "kmaps") else tensor._caches.kmaps
    if kernel_size not in maps:
        built.append(kernel_size)
        place = {key: i for i, key in enumerate(map(tuple, tensor.coords.tolist()))}
        x, y, z = (range(-(k // 2), k // 2 + 1) for k in kernel_size)
        maps[kernel_size] = [
            [(i, place[a + dx, b + dy, c + dz, image]) for (a, b, c, image), i in place.items()
             if (a + dx, b + dy, c + dz, image) in place]
            for dz, dy, dx in itertools.product(z, y, x)
        ]
    return maps[kernel_size]


@pytest.fixture(params=["fork", "2.0", "2.1", "swapped", "broken"])
def interface(request, monkeypatch):
    """Installs a stand-in; `built` lists the maps that it makes."""
    built = []

    def convolve(tensor, weight, kernel_size, depthwise=False):
        out = tensor.feats.new_zeros(len(tensor.feats), weight.shape[-1])
        for kernel, pairs in zip(weight, make_maps(tensor, kernel_size, built), strict=True):
            for i, j in pairs:
                value = tensor.feats[j] * kernel if depthwise else tensor.feats[j] @ kernel
                out = out.index_add(0, torch.tensor([i]), value[None])
        return types.SimpleNamespace(feats=out)

    def fork(input, weight, kernel_size, bias=None, depthwise=False):
        return convolve(input, weight, kernel_size, depthwise)

    def old(input, weight, kernel_size, bias=None):
        return convolve(input, weight, kernel_size)

    def new(input, weight, kernel_size, bias=None, training=False):
        assert training
        return convolve(input, weight, kernel_size)

    def swapped(input, weight, kernel_size):
        return convolve(input, weight.flip(0), kernel_size)

    def broken(input, weight):
        raise AssertionError

    functions = {"fork": fork, "2.0": old, "2.1": new, "swapped": swapped, "broken": broken}
    functional = types.SimpleNamespace(conv3d=functions[request.param])
    package = types.SimpleNamespace(SparseTensor=NewTensor if request.param == "2.1" else OldTensor)
    for name, module in [("", package), (".nn", types.SimpleNamespace()), (".nn.functional", functional)]:
        monkeypatch.setitem(sys.modules, f"torchsparse{name}", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(BACKENDS, "torchsparse", replace(BACKENDS["torchsparse"], devices=("cpu", "cuda")))
    agrees = torchsparse._agrees
    monkeypatch.setattr(torchsparse, "_agrees", lambda depthwise, device: agrees(depthwise, "cpu"))
    torchsparse.unavailable_reason.cache_clear()
    yield types.SimpleNamespace(name=request.param, built=built)
    torchsparse.unavailable_reason.cache_clear()


only = functools.partial(pytest.mark.parametrize, "interface", indirect=True)


@only(["fork", "2.0", "2.1"])
@pytest.mark.parametrize(("kernel_size", "density", "order"), [
    ((3, 3), 1 / 2, "shuffled"), ((3, 5), 1 / 3, "sorted"), ((5, 3), 1, "shuffled"), ((1, 1), 1 / 2, "sorted")])
def test_it_is_the_definition(interface, kernel_size, density, order):
    check_against_loops(conv, *draw((5, 6), density, (*kernel_size, 3, 4), order), tolerance=1e-4)
    check_against_loops(conv, *draw((5, 6), density, (*kernel_size, 3, 4), order, torch.bfloat16), tolerance=0.05)
    if interface.name == "fork":
        check_against_loops(conv, *draw((5, 6), density, (*kernel_size, 3), order), tolerance=1e-4)


@only(["2.0", "2.1"])
def test_maps_are_made_once_for_each_geometry_and_kernel_size(interface):
    features, weight, coords = draw((4, 5), 1 / 2, (3, 3, 3, 4), "sorted")
    conv(features, weight, coords)
    interface.built.clear()  # of the small example
    for _ in range(2):
        conv(features, weight, coords)
        conv(features, weight[:, :1], coords)
    assert interface.built == [(1, 3, 1)]


@only(["fork", "2.0", "2.1"])
def test_depthwise_is_offered_if_the_package_has_it(interface):
    assert resolve_backend("torchsparse", CUDA, depthwise=False) == "torchsparse"
    assert "torchsparse" in available_backends()
    if interface.name == "fork":
        assert resolve_backend("torchsparse", CUDA, depthwise=True) == "torchsparse"
    else:
        with pytest.raises(UserError, match="no depthwise kernels, the fork .* does; use model.backend=triton"):
            resolve_backend("torchsparse", CUDA, depthwise=True)


@only(["swapped", "broken"])
def test_a_package_that_does_not_compute_the_operator_is_refused(interface):
    message = {"swapped": "differs from a dense", "broken": "fails on a small example"}[interface.name]
    with pytest.raises(UserError, match=f"model.backend='torchsparse'.*{message}.*triton"):
        resolve_backend("torchsparse", CUDA, depthwise=False)


@only(["2.0"])
def test_a_missing_package_or_gpu_is_named(interface, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in torchsparse.unavailable_reason.__wrapped__(False)
    monkeypatch.setitem(sys.modules, "torchsparse.nn.functional", None)  # as if it were not installed
    assert "from source, or use model.backend=triton" in torchsparse.unavailable_reason.__wrapped__(False)
