"""Neighbour sums by the package torchsparse, if it is installed and there is a GPU.

Two interfaces are known, told apart by what their tensors carry: 1.4 to 2.0 and the fork github.com/samb-t/torchsparse
with coordinates [x, y, z, image] and maps kept in `cmaps` and `kmaps`; 2.1 with [image, x, y, z] and `_caches`.
Depthwise kernels are used if `conv3d` takes an argument `depthwise`; upstream's does not.

PyPI does not have the package, and the tests use stand-ins for both interfaces. So whatever is installed has to agree
with a dense convolution on a small example before it is used.
"""

import functools
import inspect

import torch
import torch.nn.functional as F

OTHERWISE = "use model.backend=triton or auto"


@functools.cache
def unavailable_reason(depthwise):
    """Why torchsparse cannot be used here and what to do; "" if it can."""
    try:
        from torchsparse.nn.functional import conv3d
    except (ImportError, OSError) as error:
        install = "build github.com/samb-t/torchsparse from source"
        return f"torchsparse cannot be imported ({error}); {install}, or {OTHERWISE}"
    if not torch.cuda.is_available():  # its CPU part does not work
        return f"it needs a GPU and PyTorch sees none; {OTHERWISE}"
    if depthwise and "depthwise" not in inspect.signature(conv3d).parameters:
        return f"this torchsparse has no depthwise kernels, the fork github.com/samb-t/torchsparse does; {OTHERWISE}"
    try:
        agrees = _agrees(depthwise, "cuda")
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:  # an unknown interface
        return f"this torchsparse fails on a small example ({' '.join(str(error).split())[:100]}); {OTHERWISE}"
    return "" if agrees else f"this torchsparse differs from a dense convolution on a small example; {OTHERWISE}"


def neighbour_sum(features, weight, coords):
    """sum over taps of weight[tap] h(p + tap): features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D] ->
    [B, L, C or D], like features; computed in float32, or in half precision by versions that round to it."""
    from torchsparse.nn.functional import conv3d

    kh, kw = weight.shape[:2]
    if kh * kw == 1:  # versions disagree about the shape of such kernels
        tap = weight[0, 0].to(features.dtype)
        return features * tap if weight.dim() == 3 else features @ tap
    # Rows are its second axis and columns its third; in a kernel of odd size the second changes faster.
    kernel = weight.float().transpose(0, 1).flatten(0, 1)
    options = {"depthwise": True} if weight.dim() == 3 else {}
    if "training" in inspect.signature(conv3d).parameters:
        options["training"] = True  # the maps are kept, and have to serve the gradients as well
    with torch.autocast(features.device.type, enabled=False):
        out = conv3d(_tensor(features, coords), kernel, (1, kh, kw), **options).feats
    return out.unflatten(0, features.shape[:2]).to(features.dtype)


def _tensor(features, coords):
    """A SparseTensor of the features; all that are made for `coords` share one set of maps."""
    from torchsparse import SparseTensor

    values = features.float().flatten(0, 1).contiguous()
    tensor = SparseTensor(feats=values, coords=coords.cached("torchsparse place", lambda: _place(coords)))
    maps = [name for name in ("cmaps", "kmaps", "_caches") if hasattr(tensor, name)]
    shared = coords.cached("torchsparse maps", lambda: {name: getattr(tensor, name) for name in maps})
    for name in maps:
        setattr(tensor, name, shared[name])
    return tensor


def _place(coords):
    """int32 [B · L, 4], in the order of the version that is installed."""
    from torchsparse import SparseTensor

    row, column = coords.index // coords.size[1], coords.index % coords.size[1]
    image = torch.arange(coords.batch, device=coords.device)[:, None].expand_as(row)
    place = torch.stack([torch.zeros_like(row), row, column], dim=2).flatten(0, 1).int()
    image = image.flatten()[:, None].int()
    probe = SparseTensor(feats=place.float(), coords=torch.cat([place, image], dim=1))
    return torch.cat([image, place] if hasattr(probe, "_caches") else [place, image], dim=1).contiguous()


def _agrees(depthwise, device):
    """Whether it gives the result and the gradients of a dense convolution, within half precision."""
    from data.coordinates import Coordinates

    generator = torch.Generator().manual_seed(0)
    coords = Coordinates.random(2, (5, 6), 15, generator=generator)
    coords = Coordinates(coords.index.to(device), coords.size)
    features, weight = torch.randn(2, 15, 16, generator=generator), torch.randn(3, 5, 16, 16, generator=generator)
    features, weight = features.to(device), (weight[..., 0] if depthwise else weight).to(device)
    results = []
    for function in (neighbour_sum, _dense):
        with torch.enable_grad():
            inputs = features.clone().requires_grad_(), weight.clone().requires_grad_()
            out = function(*inputs, coords)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    return all((a - b).square().mean() <= 1e-3 * b.square().mean() for a, b in zip(*results, strict=True))


def _dense(features, weight, coords):
    kernel = (weight[:, :, None] if weight.dim() == 3 else weight).permute(3, 2, 0, 1)
    groups = features.shape[2] if weight.dim() == 3 else 1
    return coords.gather(F.conv2d(coords.scatter(features), kernel, padding="same", groups=groups))
