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
CLASSES = {"rough": 0.0, "smooth": 1.0}  # name -> ν
DEVIATION = 0.2  # of a value, averaged over [0, 1]²; twice that in a corner. About 3 in 10⁵ values are clipped to ±1
POISSON = 20.0  # gives a and u about the same deviation


def gaussian_field(positions, index, smoothness=SMOOTHNESS):
    """Values [..., 1] in [−1, 1] of field `index` at positions float [..., 2], (x, y)."""
    return _values(_coefficients(index, smoothness)[None], positions)


def poisson_pair(positions, index):
    """Values [..., 2] in [−1, 1] of field `index`, a, and of the solution u of −Δu = POISSON (a − mean of a) at
    positions float [..., 2], (x, y).

    The boundary condition is Neumann's and the mean of u is 0, so u_k = POISSON a_k / (π²|k|²). A model of the pair
    recovers a from u, or u from a (docs/inverse_problems.md).
    """
    a = _coefficients(index)
    return _values(torch.stack([a, POISSON * inverse_laplacian() * a]), positions)


def field_of_class(positions, index):
    """As gaussian_field, of the smoothness of its class."""
    return gaussian_field(positions, index, CLASSES[smoothness_class(index)])


def smoothness_class(index):
    """The class of field `index`, taking the classes in turn: an example of data.condition_source."""
    return list(CLASSES)[index % len(CLASSES)]


@functools.cache
def spectrum(smoothness=SMOOTHNESS):
    """S(k), the variances of the coefficients, float32 [MODES, MODES], k1 (along y) first; they sum to DEVIATION²."""
    power = (_wavenumbers() + TAU**2) ** (-smoothness - 1)
    return (power * (DEVIATION**2 / power.sum())).float()


def inverse_laplacian():
    """(π²|k|²)⁻¹, 0 for k = 0, float32 [MODES, MODES]: the inverse of −Δ on functions of mean 0."""
    squared = _wavenumbers()
    return torch.where(squared > 0, 1 / squared, 0).float()


def _wavenumbers():
    """π²|k|², float64 [MODES, MODES]."""
    k = math.pi * torch.arange(MODES, dtype=torch.float64)
    return k[:, None] ** 2 + k**2


def _coefficients(index, smoothness=SMOOTHNESS):
    drawn = torch.randn(MODES, MODES, generator=rng.generator("cpu", "gaussian field", index))
    return drawn * spectrum(smoothness).sqrt()


def _values(coefficients, positions):
    """Σ_k c_k ψ_k1(y) ψ_k2(x), clipped, [..., C] for coefficients [C, MODES, MODES]."""
    x, y = (_cosines(u) for u in positions.unbind(-1))
    values = [(y @ one.to(positions.dtype) * x).sum(-1) for one in coefficients]
    return torch.stack(values, dim=-1).clamp(-1, 1)


def _cosines(u):
    """ψ_k(u) for k < MODES, [..., MODES]."""
    basis = torch.cos(math.pi * u[..., None] * torch.arange(MODES, dtype=u.dtype)) * math.sqrt(2)
    basis[..., 0] = 1
    return basis
