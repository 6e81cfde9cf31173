"""The sparse operator on CPU: depthwise by loops that numba compiles, full by one matrix product per tap.

Its cost follows the number of pairs of neighbours, which are listed once per geometry. Where every pixel is present, in
raster order, F.conv2d is faster and is used instead, except for the gradient of a depthwise weight.

The operators are custom operators of PyTorch, so that torch.compile takes them as they are; otherwise the depthwise one
on a subset is called directly. Half precision is widened to float32 before the loops (in them it would be widened again
for every tap) and sums are taken in float32, or float64 for float64; autocast changes nothing in them. A depthwise
result does not depend on the number of threads, which is that of torch.
"""

import functools

import torch
import torch.nn.functional as F

from models import compiled, tracing
from models.compiled import is_available, run
from models.sparse_conv import neighbour_counts

__all__ = ["is_available", "sparse_conv", "unavailable_reason"]
Tensor = torch.Tensor


def unavailable_reason(depthwise=False):
    """Why the loops cannot be compiled here and what to do; "" where they can."""
    return compiled.unavailable_reason()


def sparse_conv(features, weight, coords):
    """K h of models.sparse_conv: features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D] -> [B, L, C or D].

    The result has the dtype of the features, whatever that of the weight.
    """
    kh, kw = weight.shape[:2]
    dtype = torch.promote_types(features.dtype, torch.float32)  # of the factors: 1/3 in float32 is not 1/3 in float64
    factor = coords.cached(("sparse_conv_factor", kh, kw, dtype),
                           lambda: kh * kw / neighbour_counts(coords, (kh, kw)).to(dtype))
    if coords.is_raster:
        return correlate_image(features.unflatten(1, coords.size), weight, factor).flatten(1, 2)
    start, near, tap = coords.cached(("neighbours", kh, kw), lambda: _neighbours(coords, kh, kw))
    ones = coords.cached(("ones", dtype), lambda: torch.ones_like(factor))
    if weight.dim() == 3 and not torch.compiler.is_compiling():
        return _Depthwise.apply(features, weight, start, near, tap, ones, factor)
    return correlate(features, weight, start, near, tap, ones, factor)


@tracing.untraced
def _neighbours(coords, kh, kw):
    """All pairs of a point and a point in its window, six bytes each, point by point.

    start  int64 [B * L + 1]: those of point p (of the flattened batch) are start[p] ... start[p + 1] - 1
    near   int32 [pairs]: the other point
    tap    int16 [pairs]: row * kw + column of the kernel
    """
    start = F.pad(neighbour_counts(coords, (kh, kw)).flatten().long().cumsum(0), (1, 0))
    near, tap = (torch.empty(int(start[-1]), dtype=dtype) for dtype in (torch.int32, torch.int16))
    table = coords.table.unflatten(1, coords.size)
    run("sparse_conv.neighbours", coords.index.contiguous(), table, (kh, kw), start, near, tap)
    return start, near, tap


def _sum_neighbours(features, weight, start, near, tap, before, after):
    """correlate of a depthwise weight."""
    wide, kernel, out = _widen(features), _widen(weight), _empty(features)
    run("sparse_conv.correlate", wide.flatten(0, 1), kernel.flatten(0, 1), start, near, tap, before.flatten(),
        after.flatten(), out.flatten(0, 1))
    return out.to(features.dtype)


def _sum_products(features, grad, start, near, tap, before, after, weight):
    """correlate_weight_gradient of a depthwise weight."""
    out = _empty(weight)
    run("sparse_conv.weight_gradient", _widen(features).flatten(0, 1), _widen(grad).flatten(0, 1), start, near, tap,
        before.flatten(), after.flatten(), out.flatten(0, 1))
    return out.to(weight.dtype)


def operator(name):
    """Decorator: a custom operator on CPU, which autocast does not reach into."""

    def decorate(function):
        @functools.wraps(function)
        def wrapped(*arguments):
            with torch.autocast("cpu", enabled=False):
                return function(*arguments)

        return torch.library.custom_op(f"infty_diff::{name}", wrapped, mutates_args=(), device_types="cpu")

    return decorate


@operator("correlate")
def correlate(
    features: Tensor, weight: Tensor, start: Tensor, near: Tensor, tap: Tensor, before: Tensor, after: Tensor
) -> Tensor:
    """after · sum over the neighbours of each point of weight(tap) before(near) features(near).

    features [B, L, C]; weight [kh, kw, C] or [kh, kw, C, D]; start, near, tap as from _neighbours; before and after
    [B, L], factors of the points. Returns [B, L, C or D].
    """
    if weight.dim() == 3:
        return _sum_neighbours(features, weight, start, near, tap, before, after)
    wide, kernel = _widen(features).flatten(0, 1) * before.reshape(-1, 1), _widen(weight).flatten(0, 1)
    out = wide.new_zeros(len(wide), weight.shape[3])
    for matrix, (point, neighbour) in zip(kernel, _pairs_by_tap(start, near, tap, len(kernel)), strict=True):
        out.index_add_(0, point, wide[neighbour] @ matrix)
    return (out * after.reshape(-1, 1)).to(features.dtype).unflatten(0, features.shape[:2])


@operator("correlate_weight_gradient")
def correlate_weight_gradient(
    features: Tensor, grad: Tensor, start: Tensor, near: Tensor, tap: Tensor, before: Tensor, after: Tensor,
    weight: Tensor,
) -> Tensor:
    """sum over the pairs of each tap of before(near) features(near) after(point) grad(point), like the weight."""
    if weight.dim() == 3:
        return _sum_products(features, grad, start, near, tap, before, after, weight)
    features = _widen(features).flatten(0, 1) * before.reshape(-1, 1)
    grad = _widen(grad).flatten(0, 1) * after.reshape(-1, 1)
    out = features.new_empty(weight.shape).flatten(0, 1)
    for matrix, (point, neighbour) in zip(out, _pairs_by_tap(start, near, tap, len(out)), strict=True):
        torch.mm(features[neighbour].T, grad[point], out=matrix)
    return out.to(weight.dtype).view(weight.shape)


@operator("correlate_image")
def correlate_image(image: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """correlate where every pixel is present: image [B, H, W, C], factor [B, H * W] -> [B, H, W, C or D]."""
    kh, kw, channels = weight.shape[:3]
    kernel = _widen(weight.permute(2, 0, 1)[:, None] if weight.dim() == 3 else weight.permute(3, 2, 0, 1))
    groups = channels if weight.dim() == 3 else 1
    out = F.conv2d(_widen(image).permute(0, 3, 1, 2), kernel, padding=(kh // 2, kw // 2), groups=groups)
    out = out.permute(0, 2, 3, 1).contiguous().mul_(factor.view(*image.shape[:3], 1))
    return out.to(image.dtype)


@operator("image_weight_gradient")
def image_weight_gradient(image: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """correlate_weight_gradient where every pixel is present: image and grad [B, H, W, C or D]."""
    kh, kw = weight.shape[:2]
    image, grad = _widen(image), _widen(grad)
    if weight.dim() == 3:
        out = image.new_empty(weight.shape)
        rows = image.flatten(0, 2), grad.flatten(0, 2)
        run("sparse_conv.image_weight_gradient", *rows, (kh, kw), tuple(image.shape[1:3]), out.flatten(0, 1))
    else:
        image, grad = image.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
        shape = (weight.shape[3], weight.shape[2], kh, kw)
        out = torch.nn.grad.conv2d_weight(image, shape, grad, padding=(kh // 2, kw // 2))
        out = out.permute(2, 3, 1, 0).contiguous()
    return out.to(weight.dtype)


@correlate.register_fake
@correlate_image.register_fake
def _like_features(features, weight, *_):
    return features.new_empty(*features.shape[:-1], weight.shape[-1])


@correlate_weight_gradient.register_fake
@image_weight_gradient.register_fake
def _like_weight(features, grad, *rest):
    return torch.empty_like(rest[-1], memory_format=torch.contiguous_format)


def _backward(ctx, grad, sum_neighbours=correlate, sum_products=correlate_weight_gradient):
    features, weight, *neighbours, before, after = ctx.saved_tensors
    grad_features = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_features = sum_neighbours(grad, _turned(weight), *neighbours, after, before)
    if ctx.needs_input_grad[1]:
        grad_weight = sum_products(features, grad, *neighbours, before, after, weight)
    return grad_features, grad_weight, None, None, None, None, None


class _Depthwise(torch.autograd.Function):
    """correlate of a depthwise weight, without what PyTorch does around a custom operator: with few points that takes
    longer than the loops."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return _sum_neighbours(*inputs)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # the gradient shall be differentiated again, which needs the operators
            return _backward(ctx, grad)
        return _backward(ctx, _widen(grad), _sum_neighbours, _sum_products)


def _image_backward(ctx, grad):
    image, weight, factor = ctx.saved_tensors
    grad = grad * factor.view(*grad.shape[:3], 1)  # float32, also where grad is narrower
    grad_image = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_image = correlate_image(grad, _turned(weight), torch.ones_like(factor)).to(image.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = image_weight_gradient(image, grad, weight)
    return grad_image, grad_weight, None


def _turned(weight):
    """The kernel of the transposed operator: neighbours are mutual, and the other's tap is this one turned by 180°."""
    return weight.flip(0, 1) if weight.dim() == 3 else weight.flip(0, 1).transpose(2, 3)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


correlate.register_autograd(_backward, setup_context=_save_inputs)
correlate_image.register_autograd(_image_backward, setup_context=_save_inputs)


def _widen(values):
    return values.detach().to(_wide(values)).contiguous()


def _empty(values):
    """Room for a result like `values`, in the precision of the loops."""
    return values.new_empty(values.shape, dtype=_wide(values))


def _wide(values):
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _pairs_by_tap(start, near, tap, taps):
    """For every tap of the kernel, (point int64 [n], neighbour int64 [n]): places in the flattened batch."""
    order = tap.argsort(stable=True)
    point = torch.repeat_interleave(start.diff())[order]
    count = tap.bincount(minlength=taps).tolist()
    return zip(point.split(count), near.long()[order].split(count), strict=True)
