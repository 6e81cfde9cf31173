"""Mollified white noise as one function over [0, 1]², so that a sample starts from the same noise at every resolution.

In the orthonormal basis psi_k1(y) psi_k2(x) of functions over [0, 1]², psi_0 = 1 and psi_k(u) = sqrt(2) cos(pi k u),
the coefficients of white noise are independent and standard normal, and T multiplies them by
exp(-(pi² sigma² / 2)(k1² / R_h² + k2² / R_w²)). At the pixel centres of an H×W image the functions with k1 < H and
k2 < W are the DCT-II: T xi of that image is the sum over those, with the same coefficients whatever its size.
"""

import math

import torch

from utils import rng

NEGLIGIBLE = 1e-8  # factor of T below which a coefficient is left out: float32 would not show it


def coefficients(lead, count, block, generator=None, device=None):
    """The first count = (rows, columns) standard normal coefficients of white noise, float32 [*lead, rows, columns].

    Each is a function of its place and its sample's generator: a larger count adds coefficients and changes none.
    Those of `block` = (R_h, R_w), the training resolution, are drawn from the generator itself, and all others, one
    such block after another, from a second stream that the generator seeds. So it moves on by the same whatever the
    count, and the noise that a sampler adds in later steps is shared by all sizes too.
    lead        (batch, channels)
    generator   one torch.Generator, or a list of one per sample
    """
    first = rng.randn((*lead, *block), generator, device)
    seed = rng.draw_seed(generator, device)
    blocks = [-(-wanted // length) for wanted, length in zip(count, block, strict=True)]
    detail = rng.seeded(seed) if max(blocks) > 1 else None
    canvas = first.new_zeros(*lead, blocks[0] * block[0], blocks[1] * block[1])
    for i, j in _shells(max(blocks)):
        drawn = first if i == j == 0 else rng.randn(first.shape, detail, device)
        if i < blocks[0] and j < blocks[1]:
            canvas[..., i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] = drawn
    return canvas[..., : count[0], : count[1]]


def _shells(count):
    """Places (i, j) with i, j < count, in order of the larger of the two: those of a larger count come last."""
    return sorted(((i, j) for i in range(count) for j in range(count)), key=lambda place: (max(place), place))


def significant(length, width):
    """How many coefficients of an axis of `length` pixels matter; width is sigma as a fraction of the axis."""
    return math.ceil(min(length, math.sqrt(-2 * math.log(NEGLIGIBLE)) / (math.pi * width)))


def mollified_cosines(position, count, width, scale):
    """Values scale · exp(-(pi width k)² / 2) psi_k(u) for positions u float64 [n] and k < count, [n, count]."""
    k = torch.arange(count, dtype=torch.float64)
    basis = torch.cos(math.pi * position[:, None] * k) * math.sqrt(2)
    basis[:, 0] = 1
    return basis * torch.exp(-0.5 * (math.pi * width * k) ** 2) * scale
