"""LayerNorm, FiLM, GELU and dropout of models/normalisation.py on a GPU, by the kernels of _triton_normalisation.py.

Forward it moves the features twice, and backward three times, in their own dtype: 4 and 6 bytes a number in half
precision. The gradient of a residual is added in place, which moves them three times more. Beside the features, which
it keeps anyway, the backward pass needs two numbers a row.

With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, slowly, in Python: for tests.
"""

import torch

from models.backends.triton import is_available

__all__ = ["backward", "forward", "is_available", "takes"]
DTYPES = torch.float32, torch.bfloat16, torch.float16  # of features
# Numbers that a program has at a time, forward and backward, where a row has no more. With four warps neither kernel
# spills registers on an A100 or H100, a multiprocessor of which holds about 8 and 5 such programs.
NUMBERS, NUMBERS_BACKWARD = 2048, 1024
MOST_CHANNELS = 2048
# The gradients of gain and offset are added up in parts, and these bound what that moves: a part of 32 rows writes and
# reads again a twelfth of what it moves anyway, and 1024 parts are some for each program that an A100 or H100 can hold.
PARTS, ROWS_OF_A_PART = 1024, 32


def takes(x):
    """Whether the kernels know features x [..., channels] of that dtype and so many channels."""
    return x.dtype in DTYPES and x.shape[-1] <= MOST_CHANNELS


def forward(x, weight, bias, scale, shift, eps, gelu, dropout, seed, other):
    """(out, like x; moments float32 [2, number of rows], the mean of each row and 1 / its standard deviation).

    x             [groups, ..., channels], contiguous; a group is what shares scale and shift, one or all of its images
    weight, bias  float32 [channels], contiguous
    scale, shift  float32 [groups, channels], of any strides
    dropout       probability in [0, 1); which numbers, say seed and other, integers in [0, 2^32)
    """
    groups, rows, channels, blocks = _sizes(x, scale, NUMBERS)
    moments, out = x.new_empty(2, groups * rows, dtype=torch.float32), torch.empty_like(x)
    scale, shift = _side_by_side(scale), _side_by_side(shift)
    with torch.cuda.device_of(x):
        _kernels().forward[(groups * _ceil(rows, blocks[0]),)](
            x, out, weight, bias, scale, shift, *moments, rows, channels, scale.stride(0), shift.stride(0), eps,
            *_random(dropout, seed, other), gelu, dropout > 0, *blocks, num_warps=4,
        )  # fmt: skip
    return out, moments


def backward(grad, residual, x, weight, bias, scale, shift, moments, gelu, dropout, seed, other):
    """The gradients of x, weight, bias, scale and shift from grad, contiguous, that of what `forward` has returned.

    residual  like x, is added to the gradient of x, or None
    """
    groups, rows, channels, blocks = _sizes(x, scale, NUMBERS_BACKWARD)
    parts, span = _parts(groups, rows, blocks[0])
    grad_x, partial = torch.empty_like(x), x.new_empty(groups, parts, 2, channels, dtype=torch.float32)
    scale, shift = _side_by_side(scale), _side_by_side(shift)
    with torch.cuda.device_of(x):
        _kernels().backward[(groups * parts,)](
            x, grad, grad_x, weight, bias, scale, shift, *moments, partial, rows, channels, parts, span,
            scale.stride(0), shift.stride(0), *_random(dropout, seed, other), gelu, dropout > 0, *blocks, num_warps=4,
        )  # fmt: skip
    grad_x = grad_x if residual is None else grad_x.add_(residual)
    sums = partial.sum(1)
    grad_weight, grad_bias = (sums * scale[:, None]).sum(0)
    grad_gain, grad_offset = sums.unbind(1)
    return grad_x, grad_weight, grad_bias, torch.addcmul(grad_gain * weight, grad_offset, bias), grad_offset


def _kernels():
    from models.backends import _triton_normalisation  # here, because Triton may be missing

    return _triton_normalisation


def _sizes(x, scale, numbers):
    """(groups, rows of a group, channels, how many rows and channels a kernel takes at a time)."""
    groups, channels = scale.shape
    across = max(1 << (channels - 1).bit_length(), 16)
    return groups, x.numel() // (groups * channels), channels, (max(numbers // across, 1), across)


def _parts(groups, rows, block):
    """(parts of each group, rows of a part: whole blocks)."""
    span = max(_ceil(rows, max(PARTS // groups, 1)), ROWS_OF_A_PART)
    span = _ceil(span, block) * block
    return _ceil(rows, span), span


def _side_by_side(vectors):
    """Vectors [groups, channels], each of which lies side by side: a part of a wider matrix stays where it is."""
    return vectors if vectors.stride(1) == 1 else vectors.contiguous()


def _random(dropout, seed, other):
    """How the kernels are told which numbers to drop: factor, limit, seed and other."""
    return 1 / (1 - dropout), *(bits - 2**32 * (bits >= 2**31) for bits in (int(dropout * 2**32), seed, other))


def _ceil(count, block):
    return -(-count // block)
