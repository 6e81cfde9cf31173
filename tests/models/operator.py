"""Problems for the sparse operator, and its definition in slow loops to compare with."""

import pytest
import torch

from data.coordinates import Coordinates
from models.backends import torch_dense
from tests.reference import sparse_conv as reference


def draw(size, density, weight_shape, order, dtype=torch.float32, batch=2, device="cpu"):
    """(features, weight, coords) with gradients wanted. order: raster (Coordinates.full), sorted or shuffled."""
    generator = torch.Generator().manual_seed(1)
    pixels = size[0] * size[1]
    coords = Coordinates.random(batch, size, max(1, int(pixels * density)), generator=generator)
    index = coords.index
    if order == "shuffled":
        index = index.gather(1, torch.rand(index.shape, generator=generator).argsort(dim=1))
    coords = Coordinates.full(batch, size, device) if order == "raster" else Coordinates(index.to(device), size)
    features = torch.randn(batch, coords.num_points, weight_shape[2], generator=generator).to(device, dtype)
    weight = torch.randn(weight_shape, generator=generator).to(device)
    return features.requires_grad_(), weight.requires_grad_(), coords


def gradients(out, features, weight):
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return grad, *torch.autograd.grad(out, (features, weight), grad)


def check_against_loops(sparse_conv, features, weight, coords, tolerance):
    """Largest error of the result and of both gradients, as a share of their root mean square. Returns the three."""
    out = sparse_conv(features, weight, coords)
    grad, *ours = gradients(out, features, weight)
    arrays = [x.detach().double().cpu().numpy() for x in (features, weight)] + [coords.index.cpu().numpy(), coords.size]
    grad = grad.double().cpu().numpy()
    expected = [reference.sparse_conv(*arrays), *reference.sparse_conv_gradients(*arrays, grad)]
    for value, theirs in zip([out, *ours], map(torch.from_numpy, expected), strict=True):
        assert (value.double().cpu() - theirs).abs().max() <= tolerance * theirs.square().mean().sqrt()
    return out, *ours


def check_second_derivatives(sparse_conv, features, weight, coords):
    """The gradient in the features is linear in the weight; that in the weight cannot be differentiated again."""
    results = []
    for function in (sparse_conv, torch_dense.sparse_conv):
        out = function(features, weight, coords)
        grad = torch.ones_like(out, requires_grad=True)
        first = torch.autograd.grad(out, features, grad, create_graph=True)[0]
        results.append(torch.autograd.grad((first * features.detach()).sum(), (grad, weight)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    out = sparse_conv(features, weight, coords)
    first = torch.autograd.grad(out.square().sum(), weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()
