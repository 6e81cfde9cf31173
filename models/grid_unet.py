"""The U-Net on the regular grid ("UNO"): convolutions or Fourier layers, with attention at low resolutions.

Features are [B, G, G, C]. The U-Net takes and returns [B, C, G, G]: in channels_last format that is the same memory.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.blocks import FiLM, feed_forward, run_block
from utils.errors import UserError

HEAD = 128  # width of the hidden layer after the last level
HEAD_WIDTH = 32  # of an attention head
MODES = 4  # Fourier modes of a spectral layer
ATTENTION_KINDS = ("auto", "sdpa", "flash_attn")


@dataclass(frozen=True)
class GridSpec:
    """Architecture of the U-Net: the fields uno_* of config.model, and its `attention`."""

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
        """Channels of each level, then those of the middle."""
        return [self.base_channels * mult for mult in (1, *self.mults)]

    @property
    def resolutions(self):
        """Side of the grid at each level."""
        return [self.resolution >> level for level in range(len(self.mults))]


class GridUNet(nn.Module):
    """GridDown and its mirror image; a stage going up also takes its counterpart's output (docs/method.md, 4.4)."""

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
        self.head = feed_forward(widths[0], HEAD)

    def forward(self, grid, modulation=None):
        """grid [B, base, G, G], modulation from models.blocks.Conditioning -> like grid, in channels_last memory."""
        x, skips = self.down(grid, modulation)
        for stages, up in zip(self.stages, self.ups, strict=True):
            for stage in stages:
                x = run_block(stage, torch.cat([x, skips.pop()], dim=-1), modulation)
            x = up(x)
        return self.head(x).permute(0, 3, 1, 2)


class GridDown(nn.Module):
    """The first half of the U-Net: 1×1 convolution, levels going down, middle (block, attention, block)."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        widths, resolutions = spec.widths, spec.resolutions
        self.stem = nn.Linear(widths[0], widths[0])
        self.stages, self.downs = nn.ModuleList(), nn.ModuleList()
        for level, (resolution, blocks) in enumerate(zip(resolutions, spec.blocks_per_level, strict=True)):
            width, below = widths[level : level + 2]
            self.stages.append(nn.ModuleList(Stage(spec, width, width, resolution) for _ in range(blocks)))
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
                x = run_block(stage, x, modulation)
                skips.append(x)
            x = down(x)
        for stage in self.middle:
            x = run_block(stage, x, modulation)
        return x, skips


class Stage(nn.Module):
    """Residual block, followed by attention if `attention` is true (by default: at the resolutions of the spec)."""

    def __init__(self, spec, width_in, width_out, resolution, attention=None):
        super().__init__()
        self.block = ResidualBlock(spec, width_in, width_out, resolution)
        attention = resolution in spec.attn_resolutions if attention is None else attention
        self.attention = Attention(width_out, spec.attention) if attention else nn.Identity()

    def forward(self, x, modulation=None):
        """x [B, G, G, width_in] -> [B, G, G, width_out]."""
        return self.attention(self.block(x, modulation))


class ResidualBlock(nn.Module):
    """LayerNorm, GELU, 3×3; LayerNorm, FiLM by t and z, GELU, dropout, 3×3; plus the input (docs/method.md, 4.4).

    The last convolution is initialised to zero. conv_type "spectral" replaces both convolutions by Fourier layers.
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
        h = self.conv_in(F.gelu(self.norm_in(x)))
        h = self.dropout(F.gelu(self.film(self.norm_out(h), modulation)))
        return self.shortcut(x) + self.conv_out(h)


class Attention(nn.Module):
    """Residual multi-head attention: x + Linear(attention(LayerNorm(x))), max(width / 32, 4) heads of 32.

    kind    auto        flash_attn if it is installed and applies (CUDA, half precision), otherwise sdpa
            sdpa        F.scaled_dot_product_attention
            flash_attn  the flash-attn package; UserError if it is not installed or does not apply
    The last layer is initialised to zero, so that the module starts as the identity.
    """

    def __init__(self, width, kind="auto"):
        super().__init__()
        check_attention(kind)
        self.kind = kind
        self.flash = None if kind == "sdpa" else _flash_attn()
        self.heads = max(width // HEAD_WIDTH, 4)
        inner = self.heads * HEAD_WIDTH
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner)
        self.out = nn.Linear(inner, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        """x [B, G, G, width] -> the same shape."""
        qkv = self.qkv(self.norm(x)).flatten(1, 2).unflatten(2, (3, self.heads, HEAD_WIDTH))
        q, k, v = qkv.unbind(2)  # each [B, G * G, heads, 32]
        attention = self.flash if self._uses_flash(q) else _sdpa
        return x + self.out(attention(q, k, v).reshape(*x.shape[:-1], -1))

    def _uses_flash(self, q):
        applies = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        if self.kind == "flash_attn" and not applies:
            raise UserError(f"model.attention='flash_attn' needs a GPU and half precision, not {q.device.type} and "
                            f"{str(q.dtype).removeprefix('torch.')}; use model.attention=auto or train.precision=bf16")
        return applies and self.flash is not None


def check_attention(kind):
    """UserError if model.attention is not a known kind or its package is missing."""
    if kind not in ATTENTION_KINDS:
        raise UserError(f"model.attention={kind!r} is not one of {', '.join(ATTENTION_KINDS)}; use auto")
    if kind == "flash_attn" and _flash_attn() is None:
        raise UserError("model.attention='flash_attn' needs the package flash-attn 2, which cannot be imported; "
                        "install it or use model.attention=auto")


def _flash_attn():
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def _sdpa(q, k, v):
    dtype = q.dtype
    if q.device.type == "cpu":  # the backward pass takes ten times as long in bfloat16 as in float32
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).to(dtype)


class SpectralConv(nn.Module):
    """Fourier layer (Li et al. 2021): one complex matrix for each of the lowest modes; other modes are dropped.

    It keeps frequencies -4 ... 3 along rows and 0 ... 3 along columns (the input is real), as far as the grid has them.
    It computes in the precision of its parameters, because FFTs in half precision are inexact or missing.
    """

    def __init__(self, width_in, width_out, resolution):
        super().__init__()
        rows, columns = min(2 * MODES, resolution), min(MODES, resolution // 2 + 1)
        # A buffer, because indexing with a list makes the host wait for the GPU.
        self.register_buffer("frequencies", torch.arange(-(rows // 2), rows - rows // 2) % resolution, persistent=False)
        self.weight = nn.Parameter(torch.empty(rows, columns, width_in, width_out, 2))  # real, imaginary
        self.bias = nn.Parameter(torch.zeros(width_out))
        nn.init.normal_(self.weight, std=(2 * width_in) ** -0.5)

    def forward(self, x):
        """x [B, G, G, width_in] -> [B, G, G, width_out], float32 or float64."""
        columns = self.weight.shape[1]
        spectrum = torch.fft.rfft2(x.to(self.weight.dtype), dim=(1, 2))
        low = spectrum[:, self.frequencies, :columns]
        low = torch.einsum("bhwi,hwio->bhwo", low, torch.view_as_complex(self.weight))
        out = spectrum.new_zeros(*spectrum.shape[:3], low.shape[3])
        out[:, self.frequencies, :columns] = low
        return torch.fft.irfft2(out, s=x.shape[1:3], dim=(1, 2)) + self.bias


class Conv(nn.Conv2d):
    """nn.Conv2d of [B, H, W, C] features."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvTranspose(nn.ConvTranspose2d):
    """nn.ConvTranspose2d of [B, H, W, C] features."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _conv3(spec, width_in, width_out, resolution):
    if spec.conv_type == "spectral":
        return SpectralConv(width_in, width_out, resolution)
    return Conv(width_in, width_out, 3, padding=1)
