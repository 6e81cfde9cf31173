"""The residual block on scattered points, and the conditioning of all blocks on t and z."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.sparse_conv import sparse_conv


class SparseBlock(nn.Module):
    """x += K FiLM(LayerNorm(x)), then x += MLP(FiLM'(LayerNorm'(x))) (docs/method.md, 4.2).

    width         number of features nf of each point
    kernel_size   k, odd: taps per axis of the kernel at the training resolution
    train_size    pixels per axis of the training resolution
    depthwise     one kernel per channel, [k, k, nf], or a full one, [k, k, nf, nf]
    backend       model.backend, for K (models.sparse_conv); parameters do not depend on it
    consistent    estimate K so that its mean does not depend on the number of points (models.sparse_conv)
    """

    def __init__(self, width, kernel_size, train_size, depthwise=True, backend="auto", consistent=False):
        super().__init__()
        self.train_size, self.backend, self.consistent = train_size, backend, consistent
        self.norm_conv = nn.LayerNorm(width)
        self.film_conv = FiLM(width)
        self.kernel = nn.Parameter(torch.empty(kernel_size, kernel_size, width, *([] if depthwise else [width])))
        self.norm_mlp = nn.LayerNorm(width)
        self.film_mlp = FiLM(width)
        self.mlp = feed_forward(width, 2 * width)

        # Small, because K is a noisy estimate of its integral on a subset of the pixels.
        bound = (width * kernel_size**2) ** -0.5
        nn.init.uniform_(self.kernel, -bound, bound)
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, x, coords, modulation=None):
        """x [B, L, nf] at coords, modulation from Conditioning -> [B, L, nf]."""
        kernel = resize_kernel(self.kernel, coords.image_size, self.train_size)
        h = self.film_conv(self.norm_conv(x), modulation).to(x.dtype)  # on a GPU autocast computes norms in float32
        x = x + sparse_conv(h, kernel, coords, self.backend, self.consistent)
        return x + self.mlp(self.film_mlp(self.norm_mlp(x), modulation))

    def halo(self, image_size):
        """Rows and columns that the block sees on each side of a point in an image of size (H, W): half a kernel."""
        return tuple(resized_length(self.kernel.shape[0], length, self.train_size) // 2 for length in image_size)


def feed_forward(width, hidden):
    """Linear, GELU, Linear: [..., width] -> [..., hidden] -> [..., width]."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def resize_kernel(kernel, size, train_size):
    """A kernel [k, k, ...] for train_size² images, resized for images of size (H, W): [kh, kw, ...].

    Each axis is resampled bilinearly to its resized_length; an axis that shrinks averages taps and skips none
    (antialias). The factor k² / (kh kw) turns the operator's kh kw / |N| into k² / |N|, so that K estimates the same
    integral at every resolution (docs/method.md, 4.2).
    """
    k = kernel.shape[0]
    kh, kw = (resized_length(k, length, train_size) for length in size)
    if (kh, kw) == (k, k):
        return kernel
    taps = kernel.flatten(2) if kernel.dim() > 3 else kernel
    taps = F.interpolate(taps.permute(2, 0, 1)[None], (kh, kw), mode="bilinear", antialias=True)
    return taps[0].permute(1, 2, 0).reshape(kh, kw, *kernel.shape[2:]) * (k * k / (kh * kw))


def resized_length(k, length, train_size):
    """The odd number nearest to k · length / train_size, of two the smaller; at least min(k, 3)."""
    return max(min(k, 3), 2 * -(-k * length // (2 * train_size)) - 1)


class TimeEmbedding(nn.Module):
    """Time step -> vector: sinusoidal features, Linear, GELU, Linear (docs/method.md, 4.1).

    width  number of sinusoidal features, even
    out    length of the result
    jumps  add an embedding of a second number, the length of a jump (docs/method.md, 8.2), which is zero at first
    """

    def __init__(self, width, out, jumps=False):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
        self.jump = TimeEmbedding(width, out) if jumps else None
        if jumps:
            nn.init.zeros_(self.jump.mlp[-1].weight)
            nn.init.zeros_(self.jump.mlp[-1].bias)

    def forward(self, t):
        """t [B], int or float in [0, 1000], or [B, 2] with jumps -> [B, out]."""
        if self.jump is not None:
            return self._embed(t[:, 0]) + self.jump(t[:, 1])
        return self._embed(t)

    def _embed(self, t):
        return self.mlp(sinusoidal_features(t, self.width).to(self.mlp[0].weight.dtype))


class ConditionEmbedding(nn.Module):
    """Class or vector -> vector, which is added to that of the time step (docs/conditions.md).

    A class has a row of a table; a vector, standardised, goes through a Linear. No condition is a learnt vector, too.
    conditions  data.conditions.Conditions
    out         length of the result
    """

    def __init__(self, conditions, out):
        super().__init__()
        self.null = nn.Parameter(torch.zeros(out))
        if conditions.kind == "class":
            self.embed = nn.Embedding(conditions.size, out)
        else:
            self.embed = nn.Linear(conditions.size, out)
            self.register_buffer("mean", torch.tensor(conditions.mean), persistent=False)
            self.register_buffer("std", torch.tensor(conditions.std), persistent=False)

    def forward(self, condition):
        """condition int64 [B], −1 for none, or float32 [B, D], NaN for none -> [B, out]; None for all none -> [out]."""
        if condition is None:
            return self.null
        if condition.dim() == 1:
            return torch.where(condition[:, None] < 0, self.null, self.embed(condition.clamp(min=0)))
        absent = condition.isnan().any(1, keepdim=True)
        vector = torch.where(absent, 0, (condition - self.mean) / self.std)
        return torch.where(absent, self.null, self.embed(vector.to(self.embed.weight.dtype)))


def sinusoidal_features(t, width):
    """sin(t w_i), then cos(t w_i), w_i = exp(-ln(10⁴) i / (n - 1)) for i < n = width / 2: float32 [B, width]."""
    count = width // 2
    frequency = torch.exp(torch.arange(count, device=t.device) * (-math.log(10_000) / max(count - 1, 1)))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class FiLM(nn.Module):
    """Feature-wise modulation, h · scale + shift, by this layer's entry in the result of Conditioning.

    It has no parameters of its own. Without a modulation, in the encoder, it is the identity.
    """

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.index = None  # of the entry; Conditioning sets it

    def forward(self, h, modulation=None):
        """h [B, ..., width] -> like h."""
        if modulation is None:
            return h
        scale, shift = (vector.view(len(vector), *[1] * (h.dim() - 2), -1) for vector in modulation[self.index])
        return torch.addcmul(shift, h, scale).to(h.dtype)


class Conditioning(nn.Module):
    """Scale and shift of every FiLM layer of a network, from t and z (docs/method.md, 4.6).

    FiLM(h) = (h (1 + scale_t) + shift_t) (1 + scale_z), with (scale_t, shift_t) = Linear(GELU(t)) and
    scale_z = Linear(GELU(Linear(z))), so that scale = (1 + scale_t) (1 + scale_z) and shift = shift_t (1 + scale_z).
    Every FiLM layer has its own Linears. They are stacked here into a few large matrix products: separate ones would be
    a third of the operator calls of a training step.

    layers    the FiLM layers
    time_dim  length of the embedded t
    z_dim     length of z; 0: no z, and scale_z = 0
    """

    def __init__(self, layers, time_dim, z_dim):
        super().__init__()
        layers = sorted(layers, key=lambda layer: layer.width)
        for index, layer in enumerate(layers):
            layer.index = index
        self.widths = [layer.width for layer in layers]
        self.groups = [(width, len(list(same))) for width, same in itertools.groupby(self.widths)]
        self.time = nn.Linear(time_dim, 2 * sum(self.widths))
        self.latent = None
        if not z_dim:
            return
        self.latent = nn.Linear(z_dim, sum(self.widths))
        self.latent_weights = nn.ParameterList(torch.empty(count, width, width) for width, count in self.groups)
        self.latent_biases = nn.ParameterList(torch.empty(count, 1, width) for width, count in self.groups)
        for weight, bias in zip(self.latent_weights, self.latent_biases, strict=True):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)  # as models.build.preserve_variance does for a Linear
            nn.init.zeros_(bias)

    def forward(self, t, z):
        """t [B, time_dim] embedded, z [B, z_dim] -> list of (scale [B, width], shift [B, width]), one per FiLM layer.

        They are float32 in mixed precision too, because 1 + 0.003 is 1 in bfloat16.
        """
        scale_t, shift_t = _at_least_float32(self.time(F.gelu(t))).chunk(2, dim=1)
        scale_z = 1 if self.latent is None else 1 + _at_least_float32(self._latent_scales(F.gelu(self.latent(z))))
        scale, shift = (1 + scale_t) * scale_z, shift_t * scale_z
        return list(zip(scale.split(self.widths, dim=1), shift.split(self.widths, dim=1), strict=True))

    def _latent_scales(self, hidden):
        """The last Linear of every layer, [B, sum of widths] -> the same shape, by one product per width."""
        parts = hidden.split([width * count for width, count in self.groups], dim=1)
        scales = []
        for part, (width, count), weight, bias in zip(
                parts, self.groups, self.latent_weights, self.latent_biases, strict=True):
            layers = part.unflatten(1, (count, width)).transpose(0, 1)  # [count, B, width]
            scales.append(torch.baddbmm(bias, layers, weight).transpose(0, 1).flatten(1))
        return torch.cat(scales, dim=1)


def _at_least_float32(values):
    return values.to(torch.promote_types(values.dtype, torch.float32))


def run_block(block, *inputs):
    """block(*inputs). Activation checkpointing keeps only the inputs for the backward pass."""
    if getattr(block, "checkpoint_activations", False) and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
