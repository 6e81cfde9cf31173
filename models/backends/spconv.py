"""The full sparse operator by the package spconv, where it is installed: gather, multiply and scatter, tap by tap.

It has no depthwise kernels and no bfloat16: features of half precision are widened to float32 and the result is cast
back. spconv's `Native` algorithm runs on CPU and GPU. On CPU it has been compared with the definition
(tests/models/test_spconv_backend.py); it has not been run on a GPU here.
"""

import torch

from models import tracing
from models.derivatives import first_order_only
from models.sparse_conv import neighbour_counts


def unavailable_reason(depthwise=False):
    """Why spconv cannot be used here and what to do; "" where it can."""
    try:
        import spconv.pytorch  # noqa: F401  # here, because it takes seconds and may be missing
        from spconv.cppconstants import CPU_ONLY_BUILD
    except (ImportError, OSError) as error:
        return f"spconv cannot be imported ({error}); `pip install spconv-cu126`, or use model.backend=auto"
    if CPU_ONLY_BUILD:
        return "its CPU-only package goes wrong with several threads; `pip install spconv-cu126`, which has a CPU part"
    return ""


def is_available():
    """Whether spconv can be imported, in a build that can be trusted."""
    return not unavailable_reason()


@tracing.untraced
def sparse_conv(features, weight, coords):
    """K h of models.sparse_conv: features [B, L, C], weight [kh, kw, C, D] -> [B, L, D], in the features' dtype."""
    kh, kw = weight.shape[:2]
    pairs, count = coords.cached(("spconv_pairs", kh, kw), lambda: _pairs(coords, kh, kw))
    with torch.autocast(features.device.type, enabled=False):
        points = features.float().flatten(0, 1).contiguous()
        kernel = weight.float().permute(3, 0, 1, 2).contiguous()
        out = _Convolution.apply(points, kernel, pairs, count)
        out = out.unflatten(0, features.shape[:2]) * (kh * kw / neighbour_counts(coords, (kh, kw)))[:, :, None]
    return out.to(features.dtype)


class _Convolution(torch.autograd.Function):
    """points [N, C] and kernel [D, kh, kw, C] -> [N, D]; spconv's function, but for autocast in the backward."""

    @staticmethod
    def forward(ctx, points, kernel, pairs, count):
        from spconv.pytorch.ops import indice_conv

        ctx.save_for_backward(points, kernel, pairs, count)
        return indice_conv(points, kernel, pairs, count, len(points), subm=True)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        from spconv.pytorch.ops import indice_conv_backward

        points, kernel, pairs, count = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return *indice_conv_backward(points, kernel, grad, pairs, count, subm=True), None, None


def _pairs(coords, kh, kw):
    """spconv's lists of neighbours, one per tap, and their lengths."""
    from spconv.pytorch.ops import ConvAlgo, get_indice_pairs

    image = torch.arange(coords.batch, device=coords.device)[:, None].expand_as(coords.index)
    place = torch.stack([image, coords.index // coords.size[1], coords.index % coords.size[1]], dim=2)
    place = place.flatten(0, 1).int().contiguous()  # read as if it were: otherwise results are wrong without a word
    ones, zeros = [1, 1], [0, 0]
    _, pairs, count = get_indice_pairs(
        place, coords.batch, list(coords.size), ConvAlgo.Native, [kh, kw], ones, zeros, ones, zeros, subm=True
    )
    return pairs, count
