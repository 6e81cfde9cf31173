"""The exact flow from mollified noise to a mollified Gaussian field, whose DCT coefficients are all independent."""

import torch


class GaussianFlow:
    """Coefficients of T x_1 have standard deviation `data` and those of T ξ `noise`, both float64 [H, W].

    On a trajectory every coefficient of x_t keeps its ratio to its own standard deviation at time t.
    """

    def __init__(self, data, noise):
        self.data, self.noise = data, noise
        self.dct = [dct(length) for length in data.shape]

    def std(self, t):
        return ((t * self.data) ** 2 + ((1 - t) * self.noise) ** 2).sqrt()

    def state(self, x, t, r):
        """State at time r of the trajectory through x [..., H, W] at time t."""
        return self._scaled(x, self.std(r) / self.std(t))

    def estimate(self, x, t, r):
        """F(x, t, r): E[T x_1 | x_t = x] by the formula for jointly normal variables for r = t, else by definition."""
        if r == t:
            return self._scaled(x, t * self.data**2 / self.std(t) ** 2)
        return x + (1 - t) * (self.state(x, t, r) - x) / (r - t)

    def _scaled(self, x, factor):
        rows, columns = self.dct
        return rows.T @ (factor * (rows @ x @ columns.T)) @ columns


def dct(length):
    """Orthonormal DCT-II, float64 [length, length]."""
    k, n = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    matrix = (2 / length) ** 0.5 * torch.cos(torch.pi * k.double() * (n + 0.5) / length)
    matrix[0] /= 2**0.5
    return matrix
