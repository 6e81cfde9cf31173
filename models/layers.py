"""Convolution layers of [B, H, W, C] features, the same memory as NCHW features in channels_last format.

At the low levels of the U-Net few nodes meet large kernels. In half precision on a CPU the gradient of such a kernel is
found in half of the time by a single matrix product.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.derivatives import first_order_only


class Conv(nn.Conv2d):
    """F.conv2d of [B, H, W, C] features."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        if _trains_in_half(x) and self._is_plain() and x.numel() // self.in_channels < 9 * self.in_channels:
            return _Conv3.apply(x, self.weight, self.bias)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _is_plain(self):
        """Whether it is the layer that _Conv3 is made for."""
        return (self.kernel_size == (3, 3) and self.stride == self.padding == self.dilation == (1, 1)
                and self.groups == 1 and self.padding_mode == "zeros" and self.bias is not None)


class ConvTranspose(nn.ConvTranspose2d):
    """F.conv_transpose2d of [B, H, W, C] features."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _trains_in_half(x):
    return (x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
            and torch.is_grad_enabled() and not torch.compiler.is_compiling())


class _Conv3(torch.autograd.Function):
    """3×3 convolution in the dtype of autocast, whose gradient in the weight is one matrix product."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.dtype = x.dtype
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias.to(dtype), padding=1).permute(0, 2, 3, 1)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grad_x, grad_weight = grad.reshape(-1, grad.shape[-1]), None, None
        with torch.autocast("cpu", enabled=False):  # it may be another than that of the forward pass
            if ctx.needs_input_grad[0]:
                grad_x = F.conv_transpose2d(grad.permute(0, 3, 1, 2), weight, padding=1)
                grad_x = grad_x.permute(0, 2, 3, 1).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (rows.T @ _windows(x)).view(-1, 3, 3, x.shape[-1]).permute(0, 3, 1, 2).float()
        return grad_x, grad_weight, rows.sum(0).float() if ctx.needs_input_grad[2] else None


def _windows(x):
    """The 3×3 neighbourhoods of all nodes of [B, H, W, C], as rows [B H W, 9 C]."""
    batch, height, width, channels = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    image, row, column, channel = padded.stride()
    shape, stride = (batch, height, width, 3, 3, channels), (image, row, column, row, column, channel)
    return padded.as_strided(shape, stride).reshape(-1, 9 * channels)
