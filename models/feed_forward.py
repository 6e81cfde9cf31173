"""Linear, GELU, Linear on every point or node. On a CPU it keeps only its input for the backward pass.

The hidden layer is wider than the input, and kept before and after GELU it was more than a quarter of the memory of a
training step. The backward pass computes it again, a sixth of the layer's work, and gets GELU with its gradient.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from models import compiled
from models.normalisation import FUSED


class FeedForward(nn.Sequential):
    """Linear from `width` to `hidden` features, GELU, Linear to `width`, of [..., width]."""

    def __init__(self, width, hidden):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if self._can_fuse(x, dtype):
            return _Fused.apply(x, self[0].weight, self[0].bias, self[2].weight, self[2].bias, dtype)
        return super().forward(x)

    def _can_fuse(self, x, dtype):
        """Whether the loops can do what the modules would, who compute in `dtype`."""
        return (x.device.type == "cpu" and {x.dtype, dtype} <= set(FUSED) and x.numel() > 0
                and all(parameter.dtype == torch.float32 for parameter in self.parameters())
                and (x.dtype == torch.float32 or torch.is_autocast_enabled("cpu"))
                and not torch.compiler.is_compiling() and compiled.is_available())


class _Fused(torch.autograd.Function):
    """FeedForward as a function of x and its parameters."""

    @staticmethod
    def forward(ctx, x, *arguments):
        *parameters, ctx.dtype = arguments
        ctx.save_for_backward(x, *parameters)
        rows, weight_in, bias_in, weight_out, bias_out = _cast(ctx.dtype, x, *parameters)
        hidden = F.linear(rows, weight_in, bias_in)
        compiled.run_at("gelu.forward", [(ctx.dtype, hidden)], compiled.kind(ctx.dtype), hidden.numel())
        return F.linear(hidden, weight_out, bias_out).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        rows, weight_in, bias_in, weight_out, _ = _cast(ctx.dtype, x, *parameters)
        grad = grad.reshape(len(rows), -1)
        hidden, grad_hidden = F.linear(rows, weight_in, bias_in), grad @ weight_out
        tensors = [(ctx.dtype, hidden, grad_hidden)]
        compiled.run_at("gelu.backward", tensors, compiled.kind(ctx.dtype), hidden.numel())
        needed, gradients = ctx.needs_input_grad, [None] * 6
        if needed[0]:
            gradients[0] = (grad_hidden @ weight_in).view(x.shape)
        for place, inputs, outputs in ((1, rows, grad_hidden), (3, hidden, grad)):
            if needed[place]:
                gradients[place] = outputs.T @ inputs
            if needed[place + 1]:
                gradients[place + 1] = outputs.sum(0)
        return tuple(gradients)


def _cast(dtype, x, *parameters):
    """(x as rows, parameters), all of `dtype`."""
    return x.reshape(-1, x.shape[-1]).to(dtype), *(parameter.to(dtype) for parameter in parameters)
