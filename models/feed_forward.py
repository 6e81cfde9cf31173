"""Linear, GELU, Linear on every point or node. On a CPU its input is all that it keeps of features.

The hidden layer is wider than the input, and kept before and after GELU it was more than a quarter of the memory of a
training step. The backward pass computes it again, a sixth of the layer's work, and gets GELU with its gradient.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models import compiled
from models.derivatives import first_order_only

PARTS, MANY = 8, 4096  # the gradient of a weight is a sum over all rows: of so many, it is added up in parts


class FeedForward(nn.Sequential):
    """Linear from `width` to `hidden` features, GELU, Linear to `width`, of [..., width].

    On a CPU its layers are not called, so that hooks on them do not run; but where one of them is replaced by another
    kind of layer, they are.
    """

    def __init__(self, width, hidden):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x):
        mixed = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if mixed else x.dtype  # that the layers would compute in
        if self._can_fuse(x) and dtype in compiled.DTYPES and (mixed or dtype == torch.float32):
            return _Fused.apply(x, self[0].weight, self[0].bias, self[2].weight, self[2].bias, dtype)
        return super().forward(x)

    def _can_fuse(self, x):
        """Whether layers and input are those that the loops are made for."""
        return (x.device.type == "cpu" and x.dtype in compiled.DTYPES and x.numel() > 0
                and [type(layer) for layer in self] == [nn.Linear, nn.GELU, nn.Linear] and self[1].approximate == "none"
                and self[0].bias is not None and self[2].bias is not None
                and all(parameter.dtype == torch.float32 for parameter in self.parameters())
                and not torch.compiler.is_compiling() and compiled.is_available())


class _Fused(torch.autograd.Function):
    """FeedForward as a function of x and its parameters."""

    @staticmethod
    def forward(ctx, x, weight_in, bias_in, weight_out, bias_out, dtype):
        ctx.dtype = dtype
        weight_in, weight_out = weight_in.to(dtype), weight_out.to(dtype)
        ctx.save_for_backward(x, weight_in, bias_in, weight_out)
        hidden = F.linear(_rows(x, dtype), weight_in)  # without the bias, which the loop adds
        tensors = [(dtype, hidden), (torch.float32, bias_in.contiguous())]
        compiled.run_at("gelu.forward", tensors, compiled.kind(dtype), *hidden.shape)
        return F.linear(hidden, weight_out, bias_out.to(dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        x, weight_in, bias_in, weight_out = ctx.saved_tensors
        dtype, needed, gradients = ctx.dtype, ctx.needs_input_grad, [None] * 6
        rows, grad = _rows(x, dtype), grad.reshape(-1, grad.shape[-1])
        with torch.autocast("cpu", enabled=False):  # it may be another than that of the forward pass
            hidden, grad_hidden = F.linear(rows, weight_in), grad @ weight_out
            tensors = [(dtype, hidden), (torch.float32, bias_in.contiguous()), (dtype, grad_hidden)]
            compiled.run_at("gelu.backward", tensors, compiled.kind(dtype), *hidden.shape)
            # now `hidden` is what went into the second Linear, and `grad_hidden` the gradient of what left the first
            if needed[0]:
                gradients[0] = (grad_hidden @ weight_in).view(x.shape)
            gradients[1] = _sum_of_products(rows, grad_hidden).T if needed[1] else None
            gradients[2] = grad_hidden.sum(0) if needed[2] else None
            gradients[3] = _sum_of_products(grad, hidden) if needed[3] else None
            gradients[4] = grad.sum(0) if needed[4] else None
        return tuple(gradients)


def _rows(x, dtype):
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _sum_of_products(a, b):
    """a.T @ b in float32, of rows [N, A] and [N, B]; quicker where a is the narrower of both. Many rows are taken in
    parts, because oneDNN gives a whole sum to one core."""
    parts = PARTS if len(a) >= MANY and len(a) % PARTS == 0 else 1
    return torch.bmm(a.unflatten(0, (parts, -1)).mT, b.unflatten(0, (parts, -1))).sum(0, dtype=torch.float32)
