"""The U-Net on the regular grid ("UNO" of METHOD 4), and its down half, which the encoder uses alone.

Inside, features are [B, G, G, C]: LayerNorm, Linear (every 1×1 convolution), FiLM and attention act on the last
dimension, and convolutions see the same memory as an NCHW tensor in channels_last format, so nothing is copied.
"""

from dataclasses import dataclass

import torch
from torch import nn

from models import recompute
from models.attention import Attention
from models.conditioning import FiLM
from models.feed_forward import FeedForward
from models.layers import Conv, ConvTranspose
from models.normalisation import normalise
from models.spectral import SpectralConv

HEAD = 128  # width of the hidden layer after the last level


@dataclass(frozen=True)
class GridSpec:
    """Shape of the U-Net; fields are those of config.model with the prefix uno_."""

    resolution: int
    base_channels: int
    mults: tuple
    blocks_per_level: tuple
    attn_resolutions: tuple = ()
    dropout_from_resolution: int = 0  # dropout acts at this resolution and below
    dropout: float = 0.0
    conv_type: str = "conv"
    attention: str = "auto"

    @property
    def widths(self):
        """Channels of each level, and those below the last one."""
        return [self.base_channels * mult for mult in (1, *self.mults)]

    @property
    def resolutions(self):
        """Side of the grid at each level."""
        return [self.resolution >> level for level in range(len(self.mults))]


class GridDown(nn.Module):
    """1×1 convolution, the levels going down, and the middle (block, attention, block) of the U-Net."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        widths, resolutions = spec.widths, spec.resolutions
        self.stem = nn.Linear(widths[0], widths[0])
        self.stages, self.downs = nn.ModuleList(), nn.ModuleList()
        for level, (resolution, blocks) in enumerate(zip(resolutions, spec.blocks_per_level, strict=True)):
            width, below = widths[level : level + 2]
            self.stages.append(nn.ModuleList(
                Stage(spec, width, width, resolution) for _ in range(blocks)
            ))
            self.downs.append(Conv(width, below, 3, stride=1 if level + 1 == len(resolutions) else 2, padding=1))
        width, resolution = widths[-1], resolutions[-1]
        self.middle = nn.ModuleList([
            Stage(spec, width, width, resolution, attention=True),
            Stage(spec, width, width, resolution, attention=False),
        ])

    def forward(self, grid, modulation=None):
        """grid [B, base, G, G] -> (features [B, g, g, widths[-1]] of the lowest level, outputs of all stages)."""
        x = self.stem(grid.permute(0, 2, 3, 1))
        skips = []
        for stages, down in zip(self.stages, self.downs, strict=True):
            for stage in stages:
                x = recompute.run(stage, x, modulation)
                skips.append(x)
            x = down(x)
        for stage in self.middle:
            x = recompute.run(stage, x, modulation)
        return x, skips


class GridUNet(nn.Module):
    """GridDown mirrored: every stage going up takes the output of its counterpart going down."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.down = GridDown(spec)
        widths = spec.widths
        self.stages, self.ups = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(spec.mults))):
            width, below = widths[level : level + 2]
            self.stages.append(nn.ModuleList(
                Stage(spec, below + width, below, spec.resolutions[level])
                for _ in range(spec.blocks_per_level[level])
            ))
            up = ConvTranspose(below, width, 4, stride=2, padding=1) if level else Conv(below, width, 3, padding=1)
            self.ups.append(up)
        self.head = FeedForward(widths[0], HEAD)

    def forward(self, grid, modulation=None):
        """grid [B, base, G, G], modulation from models.conditioning -> like grid, in channels_last memory."""
        x, skips = self.down(grid, modulation)
        for stages, up in zip(self.stages, self.ups, strict=True):
            for stage in stages:
                x = recompute.run(stage, torch.cat([x, skips.pop()], dim=-1), modulation)
            x = up(x)
        return self.head(x).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Residual block, followed by attention where the spec (or the argument) asks for it."""

    def __init__(self, spec, width_in, width_out, resolution, attention=None):
        super().__init__()
        self.block = ResidualBlock(spec, width_in, width_out, resolution)
        attention = resolution in spec.attn_resolutions if attention is None else attention
        self.attention = Attention(width_out, spec.attention) if attention else nn.Identity()

    def forward(self, x, modulation):
        return self.attention(self.block(x, modulation))


class ResidualBlock(nn.Module):
    """LayerNorm, GELU, 3×3; LayerNorm, FiLM by t and z, GELU, dropout, 3×3; plus the input (METHOD 4).

    The last convolution starts at zero. conv_type "spectral" puts Fourier layers in the place of both convolutions.
    """

    def __init__(self, spec, width_in, width_out, resolution):
        super().__init__()
        self.norm_in = nn.LayerNorm(width_in)
        self.conv_in = _conv3(spec, width_in, width_out, resolution)
        self.norm_out = nn.LayerNorm(width_out)
        self.film = FiLM(width_out)
        self.dropout = nn.Dropout(spec.dropout if resolution <= spec.dropout_from_resolution else 0.0)
        self.conv_out = _conv3(spec, width_out, width_out, resolution)
        self.shortcut = nn.Linear(width_in, width_out) if width_in != width_out else nn.Identity()
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x, modulation=None):
        """x [B, G, G, width_in] -> [B, G, G, width_out]."""
        h, x = normalise(x, self.norm_in, gelu=True, residual=True)
        h = normalise(self.conv_in(h), self.norm_out, self.film, modulation, gelu=True, dropout=self.dropout)
        return self.shortcut(x) + self.conv_out(h)


def _conv3(spec, width_in, width_out, resolution):
    if spec.conv_type == "spectral":
        return SpectralConv(width_in, width_out, resolution)
    return Conv(width_in, width_out, 3, padding=1)
