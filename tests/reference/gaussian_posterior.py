"""Gaussian random fields as priors of inverse problems: their denoiser and their posterior, in closed form (numpy).

x(p) = Σ_k c_k ψ_k1(y) ψ_k2(x) with independent c_k of variance S(k), or covariance S(k) [C, C] between channels.
"""

import numpy as np


def basis(size, modes):
    """ψ_k1(y) ψ_k2(x) at the pixel centres, [H W, modes²]."""
    axes = []
    for length in size:
        position = (np.arange(length) + 0.5) / length
        axis = np.sqrt(2) * np.cos(np.pi * position[:, None] * np.arange(modes))
        axis[:, 0] = 1
        axes.append(axis)
    return np.kron(*axes)


def prior_square_root(spectrum, size):
    """L [C H W, C modes²] with Cov[x] = L Lᵀ, for a spectrum S [C, C, modes, modes]."""
    channels, modes = spectrum.shape[0], spectrum.shape[-1]
    values, vectors = np.linalg.eigh(spectrum.transpose(2, 3, 0, 1).reshape(-1, channels, channels))
    root = vectors * np.sqrt(values.clip(0))[:, None]  # [modes², C, C]
    return np.einsum("pk,kcd->cpdk", basis(size, modes), root).reshape(channels * size[0] * size[1], -1)


def draw(root, count, generator):
    """`count` fields as rows, [count, C H W]."""
    return generator.standard_normal((count, root.shape[1])) @ root.T


def matrix_of(operator, shape):
    """The matrix of an operator's A, [M, C H W]: one unit image after another."""
    import torch

    units = torch.eye(int(np.prod(shape)), dtype=torch.float64).view(-1, *shape)
    return np.concatenate([operator.A(part).flatten(1).numpy() for part in units.split(512)]).T


def posterior(root, matrix, noise, data):
    """Mean [N, P] and square root of the covariance, [P, K], of x given rows of data [N, M], y = A x + noise n.

    mean C Aᵀ (A C Aᵀ + s²)⁻¹ y, covariance C − C Aᵀ (A C Aᵀ + s²)⁻¹ A C, in terms of the coefficients of L.
    """
    seen = matrix @ root  # [M, K]
    gain = seen.T @ np.linalg.pinv(seen @ seen.T + noise**2 * np.eye(len(seen)), hermitian=True)
    covariance = np.eye(root.shape[1]) - gain @ seen
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return data @ gain.T @ root.T, root @ (vectors * np.sqrt(values.clip(0)))
