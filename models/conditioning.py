"""How the time step t and the latent z enter the network: embedding and FiLM."""

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
    """Feature-wise modulation by t and z: (h (1 + scale_t) + shift_t) (1 + scale_z) (METHOD 4).

    (scale_t, shift_t) = Linear(GELU(t)) and scale_z = Linear(GELU(Linear(z))). Either input may be missing: time_dim
    or z_dim None leaves its part out, and FiLM without both (the encoder) is the identity.
    """

    def __init__(self, width, time_dim=None, z_dim=None):
        super().__init__()
        self.time = nn.Linear(time_dim, 2 * width) if time_dim else None
        self.latent = nn.Sequential(nn.Linear(z_dim, width), nn.GELU(), nn.Linear(width, width)) if z_dim else None

    def forward(self, h, t=None, z=None):
        """h [B, ..., width], t [B, time_dim] embedded, z [B, z_dim] -> like h."""
        scale, shift = 1.0, None
        if self.time is not None:
            scale_t, shift = _expand(self.time(F.gelu(t)), h).chunk(2, dim=-1)
            scale = 1 + scale_t
        if self.latent is not None:
            scale_z = 1 + _expand(self.latent(z), h)
            scale = scale * scale_z
            shift = shift if shift is None else shift * scale_z
        if shift is None:
            return h if self.latent is None else h * scale
        return torch.addcmul(shift, h, scale)  # both factors at once: one pass over h


def _expand(vector, h):
    """[B, width] -> [B, 1, ..., 1, width] with as many dimensions as h."""
    return vector.view(len(vector), *[1] * (h.dim() - 2), -1)
