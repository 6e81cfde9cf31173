"""The sparse operator and its gradients, one point and one tap at a time."""

import numpy as np


def _pairs(index, size, kernel_size):
    """Every (image, point, tap row, tap column, neighbour) with a neighbour that is present."""
    (height, width), (kh, kw) = size, kernel_size
    for b, pixels in enumerate(index.tolist()):
        place = {pixel: i for i, pixel in enumerate(pixels)}
        for i, pixel in enumerate(pixels):
            row, column = divmod(pixel, width)
            for u in range(kh):
                for v in range(kw):
                    r, c = row + u - kh // 2, column + v - kw // 2
                    if 0 <= r < height and 0 <= c < width and r * width + c in place:
                        yield b, i, u, v, place[r * width + c]


def neighbour_counts(index, size, kernel_size):
    """|N(c)|, float64 [B, L]."""
    counts = np.zeros(index.shape)
    for b, i, _, _, _ in _pairs(index, size, kernel_size):
        counts[b, i] += 1
    return counts


def _weighted_pairs(index, size, kernel_size, consistent):
    """_pairs, each with its factor: kh kw / |N|, or if consistent 1 for the centre, else (kh kw - 1) / (|N| - 1)."""
    (kh, kw), counts = kernel_size, neighbour_counts(index, size, kernel_size)
    for b, i, u, v, j in _pairs(index, size, kernel_size):
        if not consistent:
            yield b, i, u, v, j, kh * kw / counts[b, i]
        elif i == j:
            yield b, i, u, v, j, 1
        else:
            yield b, i, u, v, j, (kh * kw - 1) / (counts[b, i] - 1)


def sparse_conv(features, weight, index, size, consistent=False):
    """K h: features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D], index [B, L] -> float64 [B, L, C or D]."""
    features, weight = features.astype(np.float64), weight.astype(np.float64)
    out = np.zeros((*index.shape, weight.shape[-1]))
    for b, i, u, v, j, factor in _weighted_pairs(index, size, weight.shape[:2], consistent):
        out[b, i] += factor * (features[b, j] * weight[u, v] if weight.ndim == 3 else features[b, j] @ weight[u, v])
    return out


def sparse_conv_gradients(features, weight, index, size, grad, consistent=False):
    """Gradients of (grad · K h).sum() with respect to features and weight."""
    features, weight = features.astype(np.float64), weight.astype(np.float64)
    grad_features, grad_weight = np.zeros_like(features), np.zeros_like(weight)
    for b, i, u, v, j, factor in _weighted_pairs(index, size, weight.shape[:2], consistent):
        incoming = factor * grad[b, i]
        if weight.ndim == 3:
            grad_features[b, j] += incoming * weight[u, v]
            grad_weight[u, v] += incoming * features[b, j]
        else:
            grad_features[b, j] += weight[u, v] @ incoming
            grad_weight[u, v] += np.outer(features[b, j], incoming)
    return grad_features, grad_weight
