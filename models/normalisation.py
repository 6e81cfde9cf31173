"""LayerNorm and what follows it in a block: FiLM, GELU, dropout. All of it is one pass over the features.

One by one each of them would read and write all features, and keep them for the backward pass: on a CPU a fifth of the
time of a training step. On a GPU, where autocast does them in float32, they would move nine times as many bytes.
"""

import functools

import torch
import torch.nn.functional as F

from models.backends import numba_normalisation, triton_normalisation
from models.derivatives import first_order_only
from models.sparse_conv import BACKENDS


def normalise(x, norm, film=None, modulation=None, gelu=False, dropout=None, residual=False):
    """dropout(GELU(FiLM(LayerNorm(x)))), with the parts that are given (METHOD 4).

    x           [B, ..., C]
    norm        nn.LayerNorm over C
    film        models.conditioning.FiLM, and the modulation that it looks itself up in, or None
    dropout     nn.Dropout or None
    residual    return x as well, for what is added to it later: used in its place, the gradients of both uses of x
                come here and are added up, by the loops of a CPU in passing
    Returns the shape and the dtype of x, or (that, x) where residual.
    """
    scale, shift = (None, None) if film is None or modulation is None else modulation[film.place]
    rate = dropout.p if dropout is not None and dropout.training else 0.0
    implementation = _choose(x.device)
    if _can_fuse(x, norm, scale, shift, implementation) and rate < 1:
        h, x = _Fused.apply(x, norm.weight, norm.bias, scale, shift, implementation, norm.eps, gelu, rate)
    else:
        h = norm(x)
        h = h if film is None else film(h, modulation)
        h = F.gelu(h) if gelu else h
        h = h if dropout is None else dropout(h)
        h = h.to(x.dtype)  # on a GPU autocast computes norms in float32
    return (h, x) if residual else h


def _choose(device):
    """The module of models/backends that computes this in one pass on `device`, or None."""
    if torch.compiler.is_compiling():
        return None
    if device.type == "cpu" and numba_normalisation.is_available():
        return numba_normalisation
    if device.type in BACKENDS["triton"].devices and triton_normalisation.is_available():
        return triton_normalisation
    return None


def _can_fuse(x, norm, scale, shift, implementation):
    """Whether that knows what to do here; it checks no shapes, so that PyTorch shall name what does not fit."""
    return (implementation is not None and implementation.takes(x) and x.numel() > 0
            and norm.weight.dtype == norm.bias.dtype == torch.float32 and norm.normalized_shape == x.shape[-1:]
            and (scale is None or scale.shape == shift.shape == (len(x), x.shape[-1])
                 and scale.dtype == shift.dtype == torch.float32))


class _Fused(torch.autograd.Function):
    """That module's functions as one of x, weight, bias, scale and shift, which returns its result and x."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, implementation, eps, gelu, dropout):
        ctx.set_materialize_grads(False)
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        ctx.implementation, ctx.modulated = implementation, scale is not None
        if not ctx.modulated:
            scale, shift = _identity(x.shape[-1], x.device)
        # drawn on the CPU, so that the host does not wait for a GPU
        ctx.options = gelu, dropout, *(torch.randint(2**32, (2,), device="cpu").tolist() if dropout else (0, 0))
        out, moments = implementation.forward(x, weight, bias, scale, shift, eps, *ctx.options)
        ctx.save_for_backward(x, weight, bias, scale, shift, moments)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(x)
        return out, x

    @staticmethod
    @first_order_only
    def backward(ctx, grad, residual):
        if grad is None:  # the result was not used
            return residual, *[None] * 8
        residual = None if residual is None else residual.contiguous()
        gradients = ctx.implementation.backward(grad.contiguous(), residual, *ctx.saved_tensors, *ctx.options)
        if not ctx.modulated:
            gradients = *gradients[:3], None, None
        return *gradients, None, None, None, None


@functools.lru_cache(maxsize=64)
def _identity(channels, device):
    """Scale and shift of no modulation."""
    exactly = {"dtype": torch.float32, "device": device}  # whatever the defaults are when it is first asked for
    with torch.inference_mode(False):  # whoever asks first, training may use them as well
        return torch.ones(1, channels, **exactly), torch.zeros(1, channels, **exactly)
