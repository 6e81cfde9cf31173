"""LayerNorm, FiLM and GELU of METHOD 4 by their formulas."""

import math

import numpy as np
import torch


def normalise(x, weight, bias, scale, shift, gelu, eps=1e-5):
    """x [B, ..., C]; weight and bias [C]; scale and shift [B, C]. Everything in the precision of the arguments."""
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    shape = (len(scale), *[1] * (x.dim() - 2), -1)
    h = ((x - mean) / (variance + eps).sqrt() * weight + bias) * scale.view(shape) + shift.view(shape)
    return h * (1 + torch.erf(h / math.sqrt(2))) / 2 if gelu else h


def kept(shape, rate, seed, other):
    """Which numbers of a tensor dropout keeps: those whose 32 random bits are not below rate. NumPy's integers wrap."""
    bits = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(seed)
    bits = (bits ^ bits >> np.uint32(16)) * np.uint32(0x85EBCA6B) ^ np.uint32(other)
    bits = (bits ^ bits >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    bits = bits ^ bits >> np.uint32(16)
    return torch.from_numpy(bits.astype(np.int64) >= int(rate * 2**32)).view(shape)
