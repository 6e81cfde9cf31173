"""What the network predicts: the training target, and the estimate of T x_0 from a prediction (docs/method.md, 3.5).

For every mean type the estimate is linear in the state and in the prediction f: T x_0 = p x_t + q M f. M is T for
predictions of quantities before mollification, and the identity for mollified ones. With a = sqrt(alpha_bar) and
b = sqrt(1 - alpha_bar), so that x_t = T(a x_0 + b xi):

    mean type           f             T x_0                   M
    mollified_epsilon   T xi          (x_t - b f) / a         1
    epsilon             xi            (x_t - b T f) / a       T
    v                   a xi - b x_0  a x_t - b T f           T
    xstart              x_0           T f                     T
"""

import dataclasses

import torch

from diffusion.mollifier import GaussianMollifier
from diffusion.schedules import Schedule


@dataclasses.dataclass(eq=False)
class Parameterisation:
    """Conversions between the network's output and T x_0.

    mean_type      mollified_epsilon, epsilon, v or xstart
    schedule       diffusion.schedules.Schedule, which the steps t index
    mollifier      diffusion.mollifier.GaussianMollifier, T
    data_variance  pointwise variance of T x_0 for output preconditioning, which only mollified_epsilon supports;
                   None: no preconditioning
    """

    mean_type: str
    schedule: Schedule
    mollifier: GaussianMollifier
    data_variance: float | None = None

    def target(self, x0, xi, t):
        """The target of f for images x0 and white noise xi, same shape [B, C, H, W]."""
        if self.mean_type == "mollified_epsilon":
            return self.mollifier.blur(xi)
        if self.mean_type == "epsilon":
            return xi
        if self.mean_type == "xstart":
            return x0
        a, b = self._levels(t, x0)
        return a * xi - b * x0

    def prediction(self, output, x_t, t):
        """f from the network's output F and the state, all [B, L, C]: F itself, or c_skip x_t + c_out F.

            c_skip = b v_n / (a² v_d + b² v_n),  c_out² = a² v_d v_n / (a² v_d + b² v_n)    (docs/method.md, 3.6)

        v_d and v_n are the pointwise variances of T x_0 and T xi. c_skip x_t is the best linear predictor of T xi from
        x_t, and c_out the standard deviation of its error (after Karras et al. 2022).
        """
        if self.data_variance is None:
            return output
        a, b = self._levels(t, x_t)
        v_d, v_n = self.data_variance, self.mollifier.noise_variance
        v_t = a**2 * v_d + b**2 * v_n
        return b * v_n / v_t * x_t + a * (v_d * v_n / v_t).sqrt() * output

    def balance(self, t, like):
        """v_n / c_out², the loss weight that makes errors of F count equally at every step; like a loss [B].

        This is lambda(sigma) of Karras et al. 2022, up to the constant v_n.
        """
        a, b = self._levels(t, like)
        v_d, v_n = self.data_variance, self.mollifier.noise_variance
        return (a**2 * v_d + b**2 * v_n) / (a**2 * v_d)

    def estimate(self, prediction, x_t, t, coords):
        """T x_0 from the prediction and the state, [B, L, C] at the coordinates; exact if coords is full."""
        p, q = self._coefficients(t, x_t)
        return p * x_t + q * self._mollified(prediction, coords)

    def estimate_error(self, prediction_error, t, coords):
        """Change of the estimate of T x_0 due to an error of the prediction, both [B, L, C]."""
        _, q = self._coefficients(t, prediction_error)
        return q * self._mollified(prediction_error, coords)

    def _levels(self, t, like):
        at = self.schedule.at
        return at("sqrt_alpha_bar", t, like), at("sqrt_one_minus_alpha_bar", t, like)

    def _coefficients(self, t, like):
        a, b = self._levels(t, like)
        if self.mean_type == "xstart":
            return 0.0, 1.0
        if self.mean_type == "v":
            return a, -b
        return 1 / a, -b / a

    def _mollified(self, values, coords):
        """M of values [B, L, C]; coords None: values are the whole state.

        On a subset, the integral T is estimated by a sum over the present points, normalised by that of their weights.
        """
        if self.mean_type == "mollified_epsilon" or self.mollifier.is_identity:
            return values
        if coords is None:
            return self.mollifier.blur(values)
        mollified = coords.gather(self.mollifier.blur(coords.scatter(values)))
        if coords.is_full:
            return mollified
        present = coords.scatter(torch.ones_like(values[:, :, :1]))
        return mollified / coords.gather(self.mollifier.blur(present))
