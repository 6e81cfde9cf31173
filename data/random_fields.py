"""Gaussian random fields over [0, 1]²: an example of functions to train on (data.function).

f(x, y) = Σ_k a_k ψ_k1(y) ψ_k2(x) with ψ_0 = 1, ψ_k(u) = √2 cos(πku) and independent normal a_k of variance

    S(k) ∝ (π²|k|² + τ²)^(−ν−1)

so f has the Matérn covariance of smoothness ν, (τ² − Δ)^(−ν−1), with the Neumann boundary condition. With τ = 3 it is
the field of the Darcy benchmark of neural operators. The ψ_k are orthonormal, so the DCT-II of an image of f measures S
(docs/method.md, 7.5). No k exceeds 31: an image of 32² or more holds all of f.
"""

import functools
import math

import torch

from utils import rng

MODES = 32  # per axis
TAU = 10.0  # 1/τ is the correlation length
SMOOTHNESS = 1.0  # ν
DEVIATION = 0.2  # of a value, averaged over [0, 1]²; twice that in a corner. About 3 in 10⁵ values are clipped to ±1


def gaussian_field(positions, index):
    """Values [..., 1] in [−1, 1] of field `index` at positions float [..., 2], (x, y)."""
    drawn = torch.randn(MODES, MODES, generator=rng.generator("cpu", "gaussian field", index))
    coefficients = (drawn * spectrum().sqrt()).to(positions.dtype)
    x, y = positions.unbind(-1)
    values = (_cosines(y) @ coefficients * _cosines(x)).sum(-1, keepdim=True)
    return values.clamp(-1, 1)


@functools.cache
def spectrum():
    """S(k), the variances of the coefficients, float32 [MODES, MODES], k1 (along y) first; they sum to DEVIATION²."""
    k = torch.arange(MODES, dtype=torch.float64)
    squared = k[:, None] ** 2 + k**2
    power = (math.pi**2 * squared + TAU**2) ** (-SMOOTHNESS - 1)
    return (power * (DEVIATION**2 / power.sum())).float()


def _cosines(u):
    """ψ_k(u) for k < MODES, [..., MODES]."""
    basis = torch.cos(math.pi * u[..., None] * torch.arange(MODES, dtype=u.dtype)) * math.sqrt(2)
    basis[..., 0] = 1
    return basis
