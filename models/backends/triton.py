"""The sparse operator on a GPU, depthwise and full, by the kernels of _triton_kernels.py.

The operators are custom operators of PyTorch, so that torch.compile takes them as they are and autocast does not reach
into them. Features are float32, float16 or bfloat16, and so is the result, whatever the dtype of the weight. Sums are
taken in float32, in a fixed order. A full kernel is multiplied by tensor cores: in the features' dtype where that is a
half precision, in float32 as TF32 where PyTorch may use it for matrix products (by default it may not).

With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, slowly, in Python: for tests.
"""

import functools
import importlib.util
import logging
import subprocess

import torch
import torch.nn.functional as F

from models.sparse_conv import INTERPRETED, neighbour_counts

Tensor = torch.Tensor
# Sizes of a program's blocks: with four warps, none of the kernels spills registers on an A100 or H100.
POINTS, CHANNELS = 32, 64  # depthwise
SIDE = {2: 64, 4: 32}  # of the blocks of a matrix product, by the bytes of a factor
PARTS = {"depthwise": 256, "full": 32}  # of the points, in the gradient of the weight; times kh · kw programs


@functools.cache  # the norms ask some hundred times in a step
def unavailable_reason(depthwise=False):
    """Why the kernels cannot be used here and what to do; "" where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with PyTorch for Linux); use model.backend=auto"
    if not (INTERPRETED or torch.cuda.is_available()):
        return "PyTorch sees no GPU; use model.backend=auto"
    return "" if INTERPRETED else _driver_problem()


@functools.cache
def _driver_problem():
    """Why Triton cannot start kernels, "" where it can: it compiles a part of itself when it first does."""
    from triton.runtime import driver  # here, because Triton may be missing

    try:
        driver.active.utils  # noqa: B018
    except (AssertionError, RuntimeError, OSError, subprocess.CalledProcessError) as error:  # it raises all of these
        problem = (f"Triton cannot start kernels ({' '.join(str(error).split())[:100]}); it needs libcuda.so, a C "
                   "compiler and Python's headers (Debian: gcc, python3-dev)")
        logging.warning("%s. Until then the slower torch_dense is used", problem)
        return problem
    return ""


def is_available():
    """Whether Triton is installed and has a GPU, and can start kernels there."""
    return not unavailable_reason()


def sparse_conv(features, weight, coords):
    """K h of models.sparse_conv: features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D] -> [B, L, C or D]."""
    kh, kw = weight.shape[:2]
    return correlate(features, weight, *coords.cached(("triton", kh, kw), lambda: _geometry(coords, kh, kw)), False)


def _geometry(coords, kh, kw):
    """(position int32 or int64 [B, L], table int32 [B, H + kh - 1, W + kw - 1], share float32 [B, L]): what the kernels
    know of the coordinates."""
    (height, width), device = coords.size, coords.device
    image = torch.arange(coords.batch, dtype=torch.int32, device=device)[:, None]
    points = torch.where(coords.table >= 0, image * coords.num_points + coords.table, -1)
    table = F.pad(points.unflatten(1, coords.size), (kw // 2, kw // 2, kh // 2, kh // 2), value=-1)
    row, column = coords.index // width + kh // 2, coords.index % width + kw // 2
    position = (image.long() * (height + kh - 1) + row) * (width + kw - 1) + column
    dtype = torch.int32 if table.numel() < 2**31 else torch.int64
    position = position.to(dtype, memory_format=torch.contiguous_format)
    return position, table, 1 / neighbour_counts(coords, (kh, kw))


def operator(function):
    """Decorator: a custom operator on a GPU, or on CPU in the interpreter."""
    name = f"infty_diff::triton_{function.__name__}"
    return torch.library.custom_op(name, function, mutates_args=(), device_types=("cuda", "cpu"))


@operator
def correlate(
    features: Tensor, weight: Tensor, position: Tensor, table: Tensor, share: Tensor, adjoint: bool
) -> Tensor:
    """K features, or K* features where `adjoint`.

    features [B, L, C]; weight [kh, kw, C] or [kh, kw, C, D]; position, table and share as from _geometry. Returns
    [B, L, C] or [B, L, D]; the adjoint of a full kernel takes [B, L, D] and returns [B, L, C].
    """
    kernels = _kernels()
    kh, kw = weight.shape[:2]
    inputs, outputs = features.shape[2], weight.shape[2 if adjoint else -1]
    points, sizes = position.numel(), (position.numel(), table.shape[2])
    out = features.new_empty(*position.shape, outputs)
    with torch.cuda.device_of(features):
        if weight.dim() == 3:
            block = _block(outputs, CHANNELS)
            tensors = features.contiguous(), weight.contiguous(), position, table, share, out
            grid = _ceil(points, POINTS), _ceil(outputs, block)
            kernels.depthwise[grid](*tensors, *sizes, outputs, kh, kw, adjoint, POINTS, block)
        else:
            features, weight = _factors(features, weight.flatten(0, 1))
            side = SIDE[features.element_size()]
            blocks = side, _block(inputs, side, 16), _block(outputs, side, 16)
            strides = (weight.mT if adjoint else weight).stride()
            tensors = features, weight, position, table, share, out
            grid = _ceil(points, side), _ceil(outputs, blocks[2])
            constants = kh, kw, adjoint, _precision(), *blocks
            kernels.full[grid](*tensors, *sizes, inputs, outputs, *strides, *constants, num_stages=_stages(features))
    return out


@operator
def correlate_weight_gradient(
    features: Tensor, grad: Tensor, position: Tensor, table: Tensor, share: Tensor, weight: Tensor
) -> Tensor:
    """Gradient of (grad · K features).sum() in the weight, like the weight: sums over parts of the points, added up."""
    kernels = _kernels()
    kh, kw, *channels = weight.shape
    if weight.dim() == 3:
        kind, kernel, side = "depthwise", kernels.depthwise_weight_gradient, POINTS
        features, grad, constants = features.contiguous(), grad.contiguous(), (kh, kw)
        blocks = [_block(*channels, CHANNELS)]
    else:
        features, grad = _factors(features, grad)
        kind, kernel, side = "full", kernels.full_weight_gradient, SIDE[features.element_size()]
        constants = kh, kw, _precision()
        blocks = [_block(count, side, 16) for count in channels]
    points = position.numel()
    span = side * _ceil(points, side * PARTS[kind])  # points of a part
    parts = _ceil(points, span)
    partial = features.new_empty(parts, *weight.shape, dtype=torch.float32)
    grid = parts * kh * kw, *map(_ceil, channels, blocks)
    with torch.cuda.device_of(features):
        kernel[grid](
            features, grad, position, table, share, partial, points, table.shape[2], *channels, span,
            *constants, side, *blocks, num_stages=_stages(features),
        )  # fmt: skip
    return partial.sum(0).to(weight.dtype)


@correlate.register_fake
def _like_output(features, weight, position, table, share, adjoint):
    return features.new_empty(*features.shape[:2], weight.shape[2 if adjoint else -1])


@correlate_weight_gradient.register_fake
def _like_weight(features, grad, position, table, share, weight):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.adjoint = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    features, weight, *geometry = ctx.saved_tensors
    grad_features = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_features = correlate(grad, weight, *geometry, not ctx.adjoint)
    if ctx.needs_input_grad[1]:  # (g · K* h) = (K g · h): in the adjoint the two change places
        pair = (grad, features) if ctx.adjoint else (features, grad)
        grad_weight = correlate_weight_gradient(*pair, *geometry, weight)
    return grad_features, grad_weight, None, None, None, None


correlate.register_autograd(_backward, setup_context=_save_inputs)


def _kernels():
    from models.backends import _triton_kernels  # here, because Triton may be missing

    return _triton_kernels


def _factors(first, second):
    """Both factors of matrix products, contiguous and in the dtype of the first; the interpreter's know no bfloat16."""
    dtype = torch.float32 if INTERPRETED else first.dtype
    return first.to(dtype).contiguous(), second.to(dtype).contiguous()


def _precision():
    """How matrix products of float32 are computed."""
    matmul = torch.backends.cuda.matmul  # since PyTorch 2.9 the older of these raises where the newer was set
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def _stages(features):
    """How many turns of a loop are under way at once. Triton 3.2, which is PyTorch 2.6's, fails to compile more than
    one with products of float32."""
    import triton  # here, because it may be missing

    return 1 if features.element_size() == 4 and triton.__version__.startswith("3.2.") else 3


def _block(channels, most, least=1):
    """Channels of a program: a power of two; a matrix product takes no less than 16."""
    return max(min(1 << (channels - 1).bit_length(), most), least)


def _ceil(count, block):
    return -(-count // block)
