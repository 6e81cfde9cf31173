"""The sparse operator by the package torchsparse, where it is installed and has a GPU.

Two interfaces are known, told apart by what their tensors carry: 1.4 to 2.0 and the fork github.com/samb-t/torchsparse
with coordinates [x, y, z, image] and maps kept in `cmaps` and `kmaps`; 2.1 with [image, x, y, z] and `_caches`.
Depthwise kernels are used where `conv3d` takes an argument `depthwise`; upstream's does not.

This file has been tested against stand-ins of both interfaces only, never against the package itself, which PyPI does
not have. So what is installed has to agree with torch_dense on a small example before it is used.
"""

import inspect

import torch

from models import tracing
from models.backends import torch_dense
from models.sparse_conv import neighbour_counts

DEVICE = "cuda"  # torchsparse's part for CPU does not work
OTHERWISE = "use model.backend=triton or auto"


def unavailable_reason(depthwise=False):
    """Why torchsparse cannot be used here and what to do; "" where it can."""
    try:
        from torchsparse.nn.functional import conv3d
    except (ImportError, OSError) as error:
        install = "build github.com/samb-t/torchsparse from source"
        return f"torchsparse cannot be imported ({error}); {install}, or {OTHERWISE}"
    if not torch.cuda.is_available():
        return f"it needs a GPU and PyTorch sees none; {OTHERWISE}"
    if depthwise and "depthwise" not in inspect.signature(conv3d).parameters:
        return f"this torchsparse has no depthwise kernels, the fork github.com/samb-t/torchsparse does; {OTHERWISE}"
    try:
        agrees = _agrees(depthwise)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:  # an unknown interface
        return f"this torchsparse fails on a small example ({' '.join(str(error).split())[:100]}); {OTHERWISE}"
    return "" if agrees else f"this torchsparse computes something else than torch_dense; {OTHERWISE}"


def is_available():
    """Whether torchsparse can be imported, has a GPU and computes what is expected, at least with full kernels."""
    return not unavailable_reason()


@tracing.untraced
def sparse_conv(features, weight, coords):
    """K h of models.sparse_conv: features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D] -> [B, L, C or D].

    The result has the dtype of the features; it is computed in float32, and rounded further where torchsparse does so.
    """
    kh, kw = weight.shape[:2]
    if kh * kw == 1:  # for which versions want kernels of different shapes
        return torch_dense.sparse_conv(features, weight, coords)
    from torchsparse.nn.functional import conv3d

    # Rows are its second axis and columns its third; of a kernel of odd size, the second changes faster.
    kernel = weight.float().transpose(0, 1).flatten(0, 1)
    options = {"depthwise": True} if weight.dim() == 3 else {}
    if "training" in inspect.signature(conv3d).parameters:
        options["training"] = True  # the maps are kept, and have to serve the gradients as well
    with torch.autocast(features.device.type, enabled=False):
        out = conv3d(_tensor(features, coords), kernel, (1, kh, kw), **options).feats
    out = out.unflatten(0, features.shape[:2]) * (kh * kw / neighbour_counts(coords, (kh, kw)))[:, :, None]
    return out.to(features.dtype)


def _tensor(features, coords):
    """A SparseTensor of the features; all that are made for `coords` share one set of maps."""
    from torchsparse import SparseTensor

    values = features.float().flatten(0, 1).contiguous()
    tensor = SparseTensor(feats=values, coords=coords.cached("torchsparse_place", lambda: _place(coords)))
    maps = [name for name in ("cmaps", "kmaps", "_caches") if hasattr(tensor, name)]
    shared = coords.cached("torchsparse_maps", lambda: {name: getattr(tensor, name) for name in maps})
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


def _agrees(depthwise):
    """Whether it gives the result and the gradients of torch_dense, within what half precision allows."""
    from data.coordinates import Coordinates

    generator = torch.Generator().manual_seed(0)
    coords = Coordinates.random(2, (5, 6), 15, generator=generator)
    coords = Coordinates(coords.index.to(DEVICE), coords.size)
    features, weight = torch.randn(2, 15, 16, generator=generator), torch.randn(3, 5, 16, 16, generator=generator)
    features, weight = features.to(DEVICE), (weight[..., 0] if depthwise else weight).to(DEVICE)
    results = []
    for function in (sparse_conv, torch_dense.sparse_conv):
        with torch.enable_grad():
            inputs = features.clone().requires_grad_(), weight.clone().requires_grad_()
            out = function(*inputs, coords)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    return all((a - b).square().mean() <= 1e-3 * b.square().mean() for a, b in zip(*results, strict=True))
