"""The sparse operator as a dense convolution of the image, in plain PyTorch: the portable reference.

Its cost does not depend on how many pixels are present. Gradients come from autograd.
"""

import torch
import torch.nn.functional as F

from models import fft_conv
from models.fft_conv import FFT_TAPS
from models.sparse_conv import neighbour_counts


def is_available():
    """Always: it needs nothing but PyTorch."""
    return True


def unavailable_reason(depthwise=False):
    """Always "": there is none."""
    return ""


def sparse_conv(features, weight, coords):
    """K h of models.sparse_conv: absent pixels are zeros, and so add nothing to the sum over the window.

    features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D] -> [B, L, C or D], of the dtype that F.conv2d returns.
    """
    kh, kw, channels = weight.shape[:3]
    depthwise = weight.dim() == 3
    image = coords.scatter(features)
    if depthwise and kh * kw >= FFT_TAPS:
        image = fft_conv.depthwise(image, weight).to(features.dtype)
    else:
        kernel = weight[:, :, None] if depthwise else weight  # [kh, kw, in, out]
        kernel, groups = kernel.permute(3, 2, 0, 1).to(features.dtype), channels if depthwise else 1
        image = F.conv2d(image, kernel, padding=(kh // 2, kw // 2), groups=groups)
    out = coords.gather(image)
    factor = kh * kw / neighbour_counts(coords, (kh, kw)).to(torch.promote_types(out.dtype, torch.float32))
    return (out * factor[:, :, None]).to(out.dtype)
