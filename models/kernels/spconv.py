"""Neighbour sums with full weights by the package spconv, if it is installed: gather, multiply and scatter, tap by tap.

It has no depthwise kernels and no bfloat16: features are widened to float32, and the result is cast back. spconv's
`Native` algorithm runs on CPU and GPU; the tests compare it with the definition on CPU.
"""

import torch


def unavailable_reason(depthwise):
    """Why spconv cannot be used here and what to do; "" if it can."""
    try:
        import spconv.pytorch  # noqa: F401  # imported on demand: it takes seconds, and may be missing
        from spconv.cppconstants import CPU_ONLY_BUILD
    except (ImportError, OSError) as error:
        return f"spconv cannot be imported ({error}); `pip install spconv-cu126`, or use model.backend=auto"
    if CPU_ONLY_BUILD:
        return "its CPU-only package goes wrong with several threads; `pip install spconv-cu126`, which has a CPU part"
    return ""


def neighbour_sum(features, weight, coords):
    """sum over taps of h(p + tap) weight[tap]: features [B, L, C], weight [kh, kw, C, D] -> [B, L, D]."""
    pairs, count = coords.cached(("spconv pairs", *weight.shape[:2]), lambda: _pairs(coords, *weight.shape[:2]))
    with torch.autocast(features.device.type, enabled=False):
        points = features.float().flatten(0, 1).contiguous()
        kernel = weight.float().permute(3, 0, 1, 2).contiguous()
        out = _Convolution.apply(points, kernel, pairs, count)
    return out.unflatten(0, features.shape[:2]).to(features.dtype)


class _Convolution(torch.autograd.Function):
    """points [N, C] and kernel [D, kh, kw, C] -> [N, D]; spconv's own function fails under autocast in the backward."""

    @staticmethod
    def forward(ctx, points, kernel, pairs, count):
        from spconv.pytorch.ops import indice_conv

        ctx.save_for_backward(points, kernel, pairs, count)
        return indice_conv(points, kernel, pairs, count, len(points), subm=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        from spconv.pytorch.ops import indice_conv_backward

        points, kernel, pairs, count = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return *indice_conv_backward(points, kernel, grad.contiguous(), pairs, count, subm=True), None, None


def _pairs(coords, kh, kw):
    """spconv's lists of neighbours, one per tap, and their lengths."""
    from spconv.pytorch.ops import ConvAlgo, get_indice_pairs

    image = torch.arange(coords.batch, device=coords.device)[:, None].expand_as(coords.index)
    place = torch.stack([image, coords.index // coords.size[1], coords.index % coords.size[1]], dim=2)
    place = place.flatten(0, 1).int().contiguous()  # spconv reads any strides as if they were contiguous
    ones, zeros = [1, 1], [0, 0]
    _, pairs, count = get_indice_pairs(
        place, coords.batch, list(coords.size), ConvAlgo.Native, [kh, kw], ones, zeros, ones, zeros, subm=True)
    return pairs, count
