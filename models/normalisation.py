"""LayerNorm and what follows it in a block: FiLM, GELU, dropout. On a CPU they are one pass over the features.

One by one each of them would read and write all features, and keep them for the backward pass; they took a fifth of the
time of a training step.
"""

import functools

import torch
import torch.nn.functional as F

from models import compiled
from models.derivatives import first_order_only


def normalise(x, norm, film=None, modulation=None, gelu=False, dropout=None):
    """dropout(GELU(FiLM(LayerNorm(x)))), with the parts that are given (METHOD 4).

    x           [B, ..., C]
    norm        nn.LayerNorm over C
    film        models.conditioning.FiLM, and the modulation that it looks itself up in, or None
    dropout     nn.Dropout or None
    Returns the shape and the dtype of x.
    """
    scale, shift = (None, None) if film is None or modulation is None else modulation[film.place]
    rate = dropout.p if dropout is not None and dropout.training else 0.0
    if _can_fuse(x, norm, scale, shift) and rate < 1:
        return _Fused.apply(x, norm.weight, norm.bias, scale, shift, norm.eps, gelu, rate)
    h = norm(x)
    h = h if film is None else film(h, modulation)
    h = F.gelu(h) if gelu else h
    h = h if dropout is None else dropout(h)
    return h.to(x.dtype)  # on a GPU autocast computes norms in float32


def _can_fuse(x, norm, scale, shift):
    """Whether the loops know what to do here; they check no shapes, so that PyTorch shall name what does not fit."""
    return (x.device.type == "cpu" and x.dtype in compiled.DTYPES and x.numel() > 0
            and norm.weight.dtype == norm.bias.dtype == torch.float32 and norm.normalized_shape == x.shape[-1:]
            and (scale is None or scale.shape == shift.shape == (len(x), x.shape[-1])
                 and scale.dtype == shift.dtype == torch.float32)
            and not torch.compiler.is_compiling() and compiled.is_available())


class _Fused(torch.autograd.Function):
    """models/loops/normalisation.py as a function of x, weight, bias, scale and shift."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, eps, gelu, dropout):
        x, weight, bias, channels = x.contiguous(), weight.contiguous(), bias.contiguous(), x.shape[-1]
        ctx.modulated = scale is not None
        scale, shift = (scale.contiguous(), shift.contiguous()) if ctx.modulated else _identity(channels)
        rows, groups = x.numel() // channels, len(scale)
        ctx.sizes = compiled.kind(x.dtype), groups, rows // groups, channels
        ctx.options = gelu, dropout, *(torch.randint(2**32, (2,)).tolist() if dropout else (0, 0))
        moments, out = x.new_empty(2, rows, dtype=torch.float32), torch.empty_like(x)
        tensors = [(x.dtype, x, out), (torch.float32, weight, bias, scale, shift, moments)]
        compiled.run_at("normalisation.forward", tensors, *ctx.sizes, eps, *ctx.options)
        ctx.save_for_backward(x, weight, bias, scale, shift, moments)
        return out

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        x, *vectors, moments = ctx.saved_tensors
        grad, grad_x, gradients = grad.contiguous(), torch.empty_like(x), [torch.empty_like(v) for v in vectors]
        tensors = [(x.dtype, x, grad, grad_x), (torch.float32, *vectors, moments, *gradients)]
        compiled.run_at("normalisation.backward", tensors, *ctx.sizes, *ctx.options)
        if not ctx.modulated:
            gradients[2:] = None, None
        return grad_x, *gradients, None, None, None


@functools.lru_cache(maxsize=64)
def _identity(channels):
    """Scale and shift of no modulation."""
    exactly = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are when it is first asked for
    with torch.inference_mode(False):  # whoever asks first, training may use them as well
        return torch.ones(1, channels, **exactly), torch.zeros(1, channels, **exactly)
