"""Inputs for the sparse operator, and checks against its definition in slow loops."""

import torch

from data.coordinates import Coordinates
from tests.reference import sparse_conv as reference


def draw(size, density, weight_shape, order, dtype=torch.float32, batch=2, device="cpu"):
    """(features, weight, coords), both requiring gradients. order: raster (Coordinates.full), sorted or shuffled."""
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
    """(a random gradient of the output, gradients of the features and of the weight)."""
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return grad, *torch.autograd.grad(out, (features, weight), grad)


def results(function, features, weight, coords):
    """The result of an operator and its two gradients."""
    out = function(features, weight, coords)
    return out, *gradients(out, features, weight)[1:]


def check_against_loops(function, features, weight, coords, tolerance, consistent=False):
    """Check the largest errors of result and gradients, relative to their root mean squares. Returns all three."""
    out = function(features, weight, coords)
    grad, *ours = gradients(out, features, weight)
    arrays = [x.detach().double().cpu().numpy() for x in (features, weight)] + [coords.index.cpu().numpy(), coords.size]
    grad = grad.double().cpu().numpy()
    expected = [reference.sparse_conv(*arrays, consistent),
                *reference.sparse_conv_gradients(*arrays, grad, consistent)]
    for value, theirs in zip([out, *ours], map(torch.from_numpy, expected), strict=True):
        assert (value.double().cpu() - theirs).abs().max() <= tolerance * theirs.square().mean().sqrt()
    assert out.dtype == ours[0].dtype == features.dtype and ours[1].dtype == weight.dtype
    return out, *ours


def check_second_derivatives(function, dense, problem, wanted):
    """Compare second derivatives with those of a dense operator, in the names `wanted` of features, weight and grad."""
    found = []
    for operator in (function, dense):
        features, weight, coords = problem
        grad = torch.ones(*features.shape[:2], weight.shape[-1], device=features.device, requires_grad=True)
        out = operator(features, weight, coords)
        first = torch.autograd.grad(out, (features, weight), grad, create_graph=True)
        inputs = [{"features": features, "weight": weight, "grad": grad}[name] for name in wanted]
        found.append(torch.autograd.grad(sum(one.square().sum() for one in first), inputs))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
