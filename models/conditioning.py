"""How the time step t and the latent z enter the network: embedding and FiLM.

A network has dozens of FiLM layers, each with three small matrices. `Conditioning` holds them all and multiplies them
in a few large products; one by one they would be a third of the operations of a training step.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn


class TimeEmbedding(nn.Module):
    """Time step -> vector: sinusoidal features, Linear, GELU, Linear (METHOD 4, step 1).

    width   number of sinusoidal features (even)
    out     length of the result
    """

    def __init__(self, width, out):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, t):
        """t [B], int or float in [0, 1000) -> [B, out]."""
        return self.mlp(sinusoidal_features(t, self.width).to(self.mlp[0].weight.dtype))


def sinusoidal_features(t, width):
    """cos(t w_i), sin(t w_i) at width / 2 angular frequencies from 1 to 1 / 10000, float32 [B, width]."""
    count = width // 2
    frequency = torch.exp(torch.arange(count, device=t.device) * (-math.log(10_000) / count))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class FiLM(nn.Module):
    """Feature-wise modulation: h scale + shift, with this layer's entry of what Conditioning returns (METHOD 4).

    It has no parameters, and without a modulation (the encoder) it is the identity.
    """

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.place = None  # its entry, which Conditioning assigns

    def forward(self, h, modulation=None):
        """h [B, ..., width] -> like h."""
        if modulation is None:
            return h
        scale, shift = (vector.view(len(vector), *[1] * (h.dim() - 2), -1) for vector in modulation[self.place])
        return torch.addcmul(shift, h, scale).to(h.dtype)


class Conditioning(nn.Module):
    """Scale and shift of every FiLM layer of a network, from t and z (METHOD 4).

    FiLM(h) = (h (1 + scale_t) + shift_t) (1 + scale_z), with (scale_t, shift_t) = Linear(GELU(t)) and
    scale_z = Linear(GELU(Linear(z))), so that scale = (1 + scale_t) (1 + scale_z) and shift = shift_t (1 + scale_z).

    layers    the FiLM layers; each has Linears of its own, whose rows are stacked in order of the layers' width
    time_dim  length of the embedded t
    z_dim     length of z; 0: there is no z, and scale_z is 0
    """

    def __init__(self, layers, time_dim, z_dim):
        super().__init__()
        layers = sorted(layers, key=lambda layer: layer.width)
        for place, layer in enumerate(layers):
            layer.place = place
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
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)  # as models.initialisation does with a Linear
            nn.init.zeros_(bias)

    def forward(self, t, z):
        """t [B, time_dim] embedded, z [B, z_dim] -> (scale [B, width], shift [B, width]) of each layer, by place.

        They are float32 in mixed precision too: in bfloat16 1 + 0.003 is 1.
        """
        scale_t, shift_t = _widen(self.time(F.gelu(t))).chunk(2, dim=1)
        scale_z = 1 if self.latent is None else 1 + _widen(self._latent_scales(F.gelu(self.latent(z))))
        scale, shift = (1 + scale_t) * scale_z, shift_t * scale_z
        return list(zip(scale.split(self.widths, dim=1), shift.split(self.widths, dim=1), strict=True))

    def _latent_scales(self, hidden):
        """The last Linear of every layer, [B, sum of widths] -> the same shape: one product for all of one width."""
        parts = hidden.split([width * count for width, count in self.groups], dim=1)
        scales = []
        for part, (width, count), weight, bias in zip(
                parts, self.groups, self.latent_weights, self.latent_biases, strict=True):
            layers = part.unflatten(1, (count, width)).transpose(0, 1)  # [count, B, width]
            scales.append(torch.baddbmm(bias, layers, weight).transpose(0, 1).flatten(1))
        return torch.cat(scales, dim=1)


def _widen(values):
    """float32 in place of half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
