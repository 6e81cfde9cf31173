"""LayerNorm, FiLM and GELU of METHOD 4 by their formulas."""

import math

import torch


def normalise(x, weight, bias, scale, shift, gelu, eps=1e-5):
    """x [B, ..., C]; weight and bias [C]; scale and shift [B, C]. Everything in the precision of the arguments."""
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    shape = (len(scale), *[1] * (x.dim() - 2), -1)
    h = ((x - mean) / (variance + eps).sqrt() * weight + bias) * scale.view(shape) + shift.view(shape)
    return h * (1 + torch.erf(h / math.sqrt(2))) / 2 if gelu else h
