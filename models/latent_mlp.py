"""The network of the second diffusion model, over latents."""

import torch
import torch.nn.functional as F
from torch import nn

from models.blocks import ConditionEmbedding, TimeEmbedding


class MLPSkipNet(nn.Module):
    """MLP that takes the noisy latent again at the input of every layer (docs/method.md, 4.8; Preechakul et al. 2022).

    z_dim         length of a latent
    hidden_dim    width of the hidden layers
    num_layers    number of layers, at least 2; the last one is a plain Linear to z_dim
    time_emb_dim  number of sinusoidal features of t, even
    dropout       probability of dropping a feature
    jumps         whether t has a second column, the length of a jump
    conditions    data.conditions.Conditions that the model follows, or None
    """

    def __init__(self, z_dim, hidden_dim, num_layers, time_emb_dim, dropout=0.0, jumps=False, conditions=None):
        super().__init__()
        self.time = TimeEmbedding(time_emb_dim, z_dim, jumps)
        inputs = [z_dim] + [hidden_dim + z_dim] * (num_layers - 2)
        self.layers = nn.ModuleList(_Layer(width, hidden_dim, z_dim, dropout) for width in inputs)
        self.out = nn.Linear(hidden_dim + z_dim, z_dim)
        self.condition = conditions and ConditionEmbedding(conditions, z_dim)

    def forward(self, z, t, condition=None):
        """z [B, z_dim], t [B] in [0, 1000] or [B, 2] -> [B, z_dim], in the dtype of z.

        condition   as for ConditionEmbedding; a model without conditions ignores it
        """
        time = self.time(t)
        time = F.gelu(time if self.condition is None else time + self.condition(condition))
        h = self.layers[0](z, time)
        for layer in self.layers[1:]:
            h = layer(torch.cat([h, z.to(h.dtype)], dim=1), time)
        return self.out(torch.cat([h, z.to(h.dtype)], dim=1)).to(z.dtype)


class _Layer(nn.Module):
    """Linear, times 1 + cond(t), LayerNorm, GELU, dropout."""

    def __init__(self, width_in, width_out, time_dim, dropout):
        super().__init__()
        self.linear = nn.Linear(width_in, width_out)
        self.cond = nn.Linear(time_dim, width_out)
        self.norm = nn.LayerNorm(width_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h, time):
        return self.dropout(F.gelu(self.norm(self.linear(h) * (1 + self.cond(time)))))
