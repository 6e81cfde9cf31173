"""The mollified diffusion process: forward process, posterior, training losses, and the network as a denoiser of T x_0.

With the identity as mollifier this is plain DDPM; with states [B, Z] it is the diffusion of latents.
"""

import dataclasses
import math

from diffusion.flow import Flow, FlowSchedule, FullNetwork, gather, scatter
from diffusion.losses import gaussian_kl, mean_per_sample, multiscale_loss, prediction_loss, vlb_weight
from diffusion.mollifier import WIENER_EPS, GaussianMollifier
from diffusion.parameterisation import Parameterisation
from diffusion.samplers import SAMPLERS
from diffusion.schedules import Schedule, check_count, log_snr_timesteps, make_betas, respaced_timesteps
from utils.errors import UserError
from utils.rng import randn

EVALUATIONS = {"ddpm": 100, "flow": 50, "few_step": 4}  # of the network for an image, by default
QUICK_EVALUATIONS = 50  # at most, for the pictures of a training run


@dataclasses.dataclass(eq=False)
class GaussianDiffusion:
    """Diffusion in the space of mollified images (docs/method.md, 3).

    schedule              diffusion.schedules.Schedule; every t below is int64 [B] in [0, len(schedule))
    mollifier             diffusion.mollifier.GaussianMollifier, T
    parameterisation      diffusion.parameterisation.Parameterisation, what the network predicts
    loss_type             mse, l1 or rescaled_mse
    variance              of p(x_{t-1} | x_t): "large" (beta_t), "small" (beta~_t) or "learned" (between the two; the
                          network then has twice the channels, predictions first)
    multiscale_max_size   finest grid of the multiscale loss; None: no multiscale loss
    balance_loss          weight the loss of each step by Parameterisation.balance, so that steps of high noise, which
                          determine the layout of an image and train the latent, count as much as others
    sampler               ddim, ddpm or dpm_solver
    """

    schedule: Schedule
    mollifier: GaussianMollifier
    parameterisation: Parameterisation
    loss_type: str = "mse"
    variance: str = "large"
    multiscale_max_size: int | None = None
    balance_loss: bool = False
    sampler: str = "ddim"

    @property
    def num_steps(self):
        return len(self.schedule)

    @property
    def evaluations(self):
        """Of the network that a sample takes."""
        return len(self.schedule)

    def with_mollifier(self, mollifier):
        """The same diffusion with another mollifier."""
        return dataclasses.replace(self, mollifier=mollifier, parameterisation=dataclasses.replace(
            self.parameterisation, mollifier=mollifier))

    def q_sample(self, x0, t, noise):
        """x_t = T(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) xi), like x0 (docs/method.md, 3.2).

        noise   standard normal draws, same shape as x0; xi is this noise scaled for the resolution of x0
        """
        signal = self.schedule.at("sqrt_alpha_bar", t, x0)
        level = self.schedule.at("sqrt_one_minus_alpha_bar", t, x0)
        return self.mollifier.blur(signal * x0 + level * self.mollifier.scale_noise(noise))

    def posterior(self, tx0, x_t, t):
        """q(x_{t-1} | x_t, x_0) = N(mean, beta~_t T T*) (docs/method.md, 3.3): mean like x_t, beta~_t [B, 1, ...].

            mean = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) · T x_0
                 + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) · x_t
        """
        at = self.schedule.at
        mean = at("posterior_x0", t, x_t) * tx0 + at("posterior_xt", t, x_t) * x_t
        return mean, at("posterior_variance", t, x_t)

    def training_losses(self, model_fn, x0, t, coords, noise=None, generator=None):
        """Losses per sample, a dict of float32 [B] (docs/method.md, 3.4).

        model_fn    (values [B, L, C], time float32 [B] in 0 ... 1000) -> [B, L, C], or [B, L, 2C] with learned variance
        x0          images [B, C, H, W] with coords, the Coordinates of the points that the network sees;
                    or latents [B, Z] with coords None and values [B, Z]
        noise       standard normal draws like x0; by default drawn from `generator` (one, or a list of one per sample)
        Returns "loss", the objective, "mse" of the prediction and, with learned variance, "vlb" in bits per value.
        """
        if noise is None:
            noise = randn(x0.shape, generator, x0.device)
        values = gather(self.q_sample(x0, t, noise), coords)
        target = gather(self.parameterisation.target(x0, self.mollifier.scale_noise(noise), t), coords)
        prediction, fraction = self._predict(model_fn, values, t)

        losses = {"mse": prediction_loss("mse", prediction, target).detach()}
        losses["loss"] = prediction_loss(self.loss_type, prediction, target)
        if self.balance_loss:
            losses["loss"] = losses["loss"] * self.parameterisation.balance(t, losses["loss"])
        if self.multiscale_max_size is not None:
            losses["loss"] = losses["loss"] + multiscale_loss(prediction, target, coords, self.multiscale_max_size)
        if self.variance == "learned":
            losses["vlb"] = self._vlb(prediction - target, fraction, t, coords)
            losses["loss"] = losses["loss"] + vlb_weight(self.loss_type, self.num_steps) * losses["vlb"]
        return losses

    def denoiser(self, model_fn, coords, clip=True):
        """The network as a Denoiser.

        coords  Coordinates.full of the images to sample, or None for latents
        clip    clamp the estimate of T x_0 to [-1, 1]: True for images, False for latents
        """
        return Denoiser(self, model_fn, coords, clip)

    def _predict(self, model_fn, values, t):
        """The prediction in float32, and the variance fraction in [-1, 1] (None unless variances are learned)."""
        output = model_fn(values, self.schedule.at("network_time", t, t)).to(values.dtype)
        fraction = None
        if self.variance == "learned":
            output, fraction = output.chunk(2, dim=-1)
        return self.parameterisation.prediction(output, values, t), fraction

    def _log_variance(self, fraction, t):
        """Log variance between log beta~_t (fraction -1) and log beta_t (fraction 1) (docs/method.md, 3.7; Nichol and
        Dhariwal 2021, eq. 15)."""
        small = self.schedule.at("variance_small", t, fraction).log()
        large = self.schedule.at("betas", t, fraction).log()
        return small + (fraction + 1) / 2 * (large - small)

    def _vlb(self, prediction_error, fraction, t, coords):
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits per value, [B] (docs/method.md, 3.7).

        Computed for the pointwise marginals, whose variance is that of the step times that of T xi. T x_0 is not an
        8-bit image, so step 0 is a KL too, with beta~ of step 1. The mean is detached: the bound trains the variance
        only.
        """
        x0_error = self.parameterisation.estimate_error(prediction_error.detach(), t, coords)
        mean_difference = self.schedule.at("posterior_x0", t, x0_error) * x0_error
        log_noise = math.log(self.mollifier.noise_variance)
        q = self.schedule.at("variance_small", t, fraction).log() + log_noise
        return mean_per_sample(gaussian_kl(mean_difference, q, self._log_variance(fraction, t) + log_noise))


class Denoiser(FullNetwork):
    """denoise(x, t) -> estimate of T x_0, like x [B, C, H, W] or [B, Z]: the only view of a network that samplers have.
    """

    def __call__(self, x, t):
        return self.with_variance(x, t)[0]

    def with_variance(self, x, t):
        """The estimate of T x_0, and the variance of p(x_{t-1} | x_t) as a factor of T T*, broadcastable to x."""
        diffusion = self.diffusion
        values = gather(x, self.coords)
        prediction, fraction = diffusion._predict(self.model_fn, values, t)
        estimate = scatter(diffusion.parameterisation.estimate(prediction, values, t, self.coords), self.coords)
        if self.clip:
            estimate = estimate.clamp(-1, 1)
        if fraction is None:
            return estimate, diffusion.schedule.at(f"variance_{diffusion.variance}", t, x)
        return estimate, scatter(diffusion._log_variance(fraction, t).exp(), self.coords)


def build_diffusion(config, steps=None, sampler=None, wiener_eps=WIENER_EPS):
    """GaussianDiffusion or Flow for a checked config of either stage, as diffusion.objective says.

    steps       network evaluations of a sample, at most diffusion.steps; None: all steps (training)
    sampler     one of diffusion.samplers.SAMPLERS, by default the objective's first. It determines the spacing of the
                steps: even in the log SNR for dpm_solver, even in time otherwise
    wiener_eps  epsilon of the Wiener filter
    A stage-2 config has no fields for the mollifier, learned variance, preconditioning and the multiscale loss, which
    are then off. Raises UserError for values that do not go together.
    """
    options, images = config.diffusion, _has_images(config)
    resolution = config.data.img_size if images else None
    flag = "--sampling_steps" if images else "--latent_sampling_steps"
    sampler = resolve_sampler(config, sampler)
    mollified = options.get("mollifier_type", "none") == "dct"
    mollifier = GaussianMollifier(options.gaussian_filter_std if mollified else 0.0, resolution, wiener_eps)
    multiscale_max_size = options.multiscale_max_img_size if options.get("multiscale_loss", False) else None

    if options.objective != "ddpm":
        _check_flow(config)
        if steps is not None:
            check_count(options.steps, steps, flag)
        evaluations = steps or options.steps
        return Flow(
            FlowSchedule(evaluations // 2 + 1 if sampler == "heun" and steps else evaluations),
            mollifier,
            options.get("data_std", 1.0) ** 2,  # latents are standardised
            jumps=options.objective == "few_step",
            sampler=sampler,
            evaluations=evaluations,
            multiscale_max_size=multiscale_max_size,
        )

    betas = make_betas(options.noise_schedule, options.steps, resolution)
    visited = None
    if steps is not None:
        visited = (log_snr_timesteps(betas, steps, flag) if sampler == "dpm_solver"
                   else respaced_timesteps(options.steps, steps, flag))
    schedule = Schedule.from_betas(betas, visited)

    data_variance = None
    if options.get("precondition", False):
        if options.model_mean_type != "mollified_epsilon":
            raise UserError("diffusion.precondition=True needs diffusion.model_mean_type='mollified_epsilon', not "
                            f"{options.model_mean_type!r}; change one of them")
        data_variance = options.data_std**2
    elif options.get("balance_loss", False):
        raise UserError("diffusion.balance_loss=True needs diffusion.precondition=True; change one of them")
    variance = "small" if config.model.get("sigma_small", False) else "large"
    return GaussianDiffusion(
        schedule,
        mollifier,
        Parameterisation(options.model_mean_type, schedule, mollifier, data_variance),
        loss_type=options.loss_type,
        variance="learned" if config.model.get("learn_sigma", False) else variance,
        multiscale_max_size=multiscale_max_size,
        balance_loss=options.get("balance_loss", False),
        sampler=sampler,
    )


def sampling_diffusion(config, steps=None, sampler=None, wiener_eps=WIENER_EPS, quick=False):
    """build_diffusion with the sampler and the number of evaluations that suit the objective, where none are given.

    Latents of a ddpm model take all steps of ancestral sampling.
    quick     for a look at a model in training: the objective's first sampler, with fewer evaluations
    """
    objective, most = config.diffusion.objective, config.diffusion.steps
    if quick:
        return build_diffusion(config, min(QUICK_EVALUATIONS, EVALUATIONS[objective], most))
    if objective == "ddpm" and not _has_images(config):
        steps, sampler = steps or most, sampler or "ddpm"
    return build_diffusion(config, steps or min(EVALUATIONS[objective], most), sampler, wiener_eps)


def resolve_sampler(config, name=None):
    """The sampler `name`, or the first one of diffusion.objective. UserError if it does not fit the objective."""
    objective = config.diffusion.objective
    if name is None:
        return SAMPLERS[objective][0]
    if name not in SAMPLERS[objective]:
        flag = "--sampler" if _has_images(config) else "--latent_sampler"
        raise UserError(f"{flag}={name} does not sample a model with diffusion.objective={objective!r}; use one of "
                        f"{', '.join(SAMPLERS[objective])}")
    return name


def _check_flow(config):
    """UserError for options that only GaussianDiffusion has."""
    objective = config.diffusion.objective
    needed = {"diffusion.loss_type": "mse", "diffusion.precondition": False, "diffusion.balance_loss": False,
              "model.learn_sigma": False, "model.sigma_small": False}
    if objective == "few_step":
        needed["diffusion.schedule_sampler"] = "uniform"
    for name, value in needed.items():
        section, field = name.split(".")
        if (given := config[section].get(field, value)) != value:
            raise UserError(f"{name}={given!r} does not go with diffusion.objective={objective!r}; use {value!r}")


def _has_images(config):
    return "img_size" in config.get("data", {})
