"""LayerNorm, FiLM, GELU and dropout of models/normalisation.py on a CPU, by the loops of models/loops/normalisation.py.
triton_normalisation.py has the same functions and says what their arguments are."""

import torch

from models.compiled import DTYPES, is_available, kind, run_at

__all__ = ["backward", "forward", "is_available", "takes"]


def takes(x):
    """Whether the loops know features of that dtype."""
    return x.dtype in DTYPES


def forward(x, weight, bias, scale, shift, eps, *options):
    """(out, moments)."""
    scale, shift = scale.contiguous(), shift.contiguous()
    moments, out = x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32), torch.empty_like(x)
    tensors = [(x.dtype, x, out), (torch.float32, weight, bias, scale, shift, moments)]
    run_at("normalisation.forward", tensors, *_sizes(x, scale), eps, *options)
    return out, moments


def backward(grad, residual, x, weight, bias, scale, shift, moments, *options):
    """The gradients of x, with residual, and of weight, bias, scale and shift."""
    vectors = [weight, bias, scale.contiguous(), shift.contiguous()]
    grad_x, gradients = torch.empty_like(x), [torch.empty_like(vector) for vector in vectors]
    add = residual is not None
    tensors = [(x.dtype, x, grad, residual if add else grad, grad_x), (torch.float32, *vectors, moments, *gradients)]
    run_at("normalisation.backward", tensors, *_sizes(x, scale), add, *options)
    return grad_x, *gradients


def _sizes(x, scale):
    """(kind, groups, rows of a group, channels), as the loops take them."""
    return kind(x.dtype), len(scale), x.numel() // scale.numel(), x.shape[-1]
