"""Self-attention over the nodes of the grid."""

import functools
import importlib

import torch
import torch.nn.functional as F
from torch import nn

from models import tracing
from models.normalisation import normalise
from utils.errors import UserError

HEAD_WIDTH = 32
KINDS = ("auto", "sdpa", "flash_attn")


class Attention(nn.Module):
    """Residual multi-head attention: x + Linear(attention(LayerNorm(x))), max(width / 32, 4) heads of 32 (METHOD 4).

    kind    auto        flash_attn where it is installed and applies (CUDA, half precision), otherwise sdpa
            sdpa        F.scaled_dot_product_attention
            flash_attn  the flash-attn package; UserError where it is not installed or does not apply
    The last layer starts at zero, so that the module starts as the identity.
    """

    def __init__(self, width, kind="auto"):
        super().__init__()
        check_attention(kind)
        self.kind = kind
        self.heads = max(width // HEAD_WIDTH, 4)
        inner = self.heads * HEAD_WIDTH
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        """x [B, G, G, width] -> the same shape."""
        h, x = normalise(x, self.norm, residual=True)
        qkv = self.qkv(h).flatten(1, 2).unflatten(2, (3, self.heads, HEAD_WIDTH))
        del h  # which need not wait for the attention
        q, k, v = qkv.unbind(2)  # each [B, G * G, heads, 32]
        attention = _flash_attention if self._uses_flash(q) else _sdpa
        return x + self.out(attention(q, k, v).reshape(*x.shape[:-1], -1))

    def _uses_flash(self, q):
        applies = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        if self.kind == "flash_attn" and not applies:
            raise UserError(f"model.attention='flash_attn' needs a GPU and half precision, not {q.device.type} and "
                            f"{str(q.dtype).removeprefix('torch.')}; use model.attention=auto or train.precision=bf16")
        return applies and self.kind != "sdpa" and _has_flash_attn()


def check_attention(kind):
    """UserError where model.attention is not a known kind or its package is missing."""
    if kind not in KINDS:
        raise UserError(f"model.attention={kind!r} is not one of {', '.join(KINDS)}; use auto")
    if kind == "flash_attn" and not _has_flash_attn():
        raise UserError("model.attention='flash_attn' needs the package flash-attn 2, which cannot be imported; "
                        "install it or use model.attention=auto")


def _sdpa(q, k, v):
    dtype = q.dtype
    if q.device.type == "cpu":  # its backward pass in bfloat16 takes ten times as long as in float32
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).to(dtype)


def _flash_attention(q, k, v):
    return _flash_attn().flash_attn_func(q, k, v)


@tracing.constant  # torch.compile would follow the import, and break the graph there
def _has_flash_attn():
    return _flash_attn() is not None


@functools.cache
def _flash_attn():
    try:
        return importlib.import_module("flash_attn")
    except ImportError:
        return None
