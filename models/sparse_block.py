"""The residual block on scattered points, and its convolution kernel at other resolutions."""

import torch
import torch.nn.functional as F
from torch import nn

from models.conditioning import FiLM
from models.feed_forward import FeedForward
from models.normalisation import normalise
from models.sparse_conv import sparse_conv


class SparseBlock(nn.Module):
    """x += K FiLM(LayerNorm(x)), then x += MLP(FiLM'(LayerNorm'(x))) (METHOD 4).

    width         number of features nf of each point
    kernel_size   k, odd: taps per axis of the kernel at the training resolution
    train_size    pixels per axis of the training resolution
    depthwise     one kernel per channel, [k, k, nf], or a full one, [k, k, nf, nf]
    backend       what computes K (models.sparse_conv); parameters do not depend on it
    """

    def __init__(self, width, kernel_size, train_size, depthwise=True, backend="auto"):
        super().__init__()
        self.train_size = train_size
        self.backend = backend
        self.norm_conv = nn.LayerNorm(width)
        self.film_conv = FiLM(width)
        self.kernel = nn.Parameter(torch.empty(kernel_size, kernel_size, width, *([] if depthwise else [width])))
        self.norm_mlp = nn.LayerNorm(width)
        self.film_mlp = FiLM(width)
        self.mlp = FeedForward(width, 2 * width)

        # Small, because on a subset K is a noisy estimate of its integral.
        bound = (width * kernel_size**2) ** -0.5
        nn.init.uniform_(self.kernel, -bound, bound)
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, x, coords, modulation=None):
        """x [B, L, nf] at coords, modulation from models.conditioning.Conditioning -> [B, L, nf]."""
        kernel = resize_kernel(self.kernel, coords.image_size, self.train_size)
        h, x = normalise(x, self.norm_conv, self.film_conv, modulation, residual=True)
        x = x + sparse_conv(h, kernel, coords, self.backend)
        h, x = normalise(x, self.norm_mlp, self.film_mlp, modulation, residual=True)
        return x + self.mlp(h)


def resize_kernel(kernel, size, train_size):
    """The kernel [k, k, ...] of train_size² images, for images of size (H, W): [kh, kw, ...] (METHOD 4).

    Each axis gets the odd length nearest to k · H / train_size (of two equally near ones the longer, and never below
    3), resampled bilinearly; where it shrinks, taps are averaged and not skipped (antialias). The factor k² / (kh kw)
    turns the operator's kh kw / |N| into k² / |N|, so that K is an estimate of the same integral at every resolution.
    """
    k = kernel.shape[0]
    kh, kw = (max(min(k, 3), 2 * (k * length // (2 * train_size)) + 1) for length in size)
    if (kh, kw) == (k, k):
        return kernel
    taps = kernel.flatten(2) if kernel.dim() > 3 else kernel
    taps = F.interpolate(taps.permute(2, 0, 1)[None], (kh, kw), mode="bilinear", antialias=True)
    return taps[0].permute(1, 2, 0).reshape(kh, kw, *kernel.shape[2:]) * (k * k / (kh * kw))
