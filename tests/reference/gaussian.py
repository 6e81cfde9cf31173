"""Conditioning of a joint normal distribution, with full covariance matrices."""

import numpy as np


def condition(mean, covariance, known, value):
    """Mean and covariance of the other entries of a normal vector, given that the entries `known` (bool) have `value`.

    Pseudo-inverse, because the covariances of mollified noise are close to singular.
    """
    other = ~known
    gain = covariance[np.ix_(other, known)] @ np.linalg.pinv(covariance[np.ix_(known, known)], hermitian=True)
    conditional_mean = mean[other] + gain @ (value - mean[known])
    return conditional_mean, covariance[np.ix_(other, other)] - gain @ covariance[np.ix_(known, other)]


def kl(mean_q, variance_q, mean_p, variance_p, points=200_001, width=12):
    """KL(q || p) of two scalar normal distributions in nats, by numerical integration."""
    x = np.linspace(mean_q - width * variance_q**0.5, mean_q + width * variance_q**0.5, points)

    def log_density(mean, variance):
        return -0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)

    q = log_density(mean_q, variance_q)
    return np.trapezoid(np.exp(q) * (q - log_density(mean_p, variance_p)), x)
