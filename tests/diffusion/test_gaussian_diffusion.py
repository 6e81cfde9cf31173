"""The mollified process against brute-force normal conditioning, and its training losses with known networks."""

import math

import numpy as np
import pytest
import torch

from configs.defaults import autoencoder_config, latent_config
from data.coordinates import Coordinates
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.losses import multiscale_loss
from tests.reference import gaussian
from tests.reference import mollifier as reference
from utils.config import ONE_OF
from utils.errors import UserError
from utils.rng import generator, randn

MEAN_TYPES = ONE_OF["diffusion.model_mean_type"]


def image_config(**options):
    """A stage-1 config at 16²; options are fields of its sections diffusion or model."""
    config = autoencoder_config(16)
    for name, value in options.items():
        setattr(config.diffusion if name in config.diffusion else config.model, name, value)
    return config


def draw(size, batch=5, dtype=torch.float32):
    """x_0, noise and steps from the first to the last."""
    x0, noise = (randn((batch, 3, *size), generator("cpu", name)).to(dtype) for name in ("x0", "noise"))
    return 0.5 * x0, noise, torch.tensor([0, 1, 400, 998, 999])[:batch]


def point_set(batch, size, kind):
    if kind == "full":
        return Coordinates.full(batch, size)
    return Coordinates.random(batch, size, size[0] * size[1] // 3, generator=generator("cpu", "points"))


def target_of(diffusion, x0, noise, t):
    return diffusion.parameterisation.target(x0, diffusion.mollifier.scale_noise(noise), t)


@pytest.mark.parametrize("steps", [None, 7])
@pytest.mark.parametrize("step", [1, 3, -1])
def test_posterior_is_the_conditional_of_the_joint_normal(steps, step):
    """Joint of (x_{t-1}, x_t) given x_0 with T as a matrix, conditioned on x_t by numpy."""
    size, pixels = (4, 5), 20
    config = image_config(gaussian_filter_std=0.6)
    diffusion = build_diffusion(config, steps)
    step = step % diffusion.num_steps
    a, a_prev = diffusion.schedule.alpha_bar[step].item(), diffusion.schedule.alpha_bar[step - 1].item()
    sigmas = (0.6 * size[0] / 16, 0.6 * size[1] / 16)
    operator = reference.matrix(size, sigmas)
    covariance = operator @ operator.T  # of T xi; both sides of the comparison scale with it
    alpha = a / a_prev
    x0 = np.random.default_rng(0).normal(size=pixels)
    tx0 = operator @ x0

    # x_t = sqrt(alpha) x_{t-1} + sqrt(1 - alpha) T xi, which is how the chain is built step by step
    mean = np.concatenate([math.sqrt(a_prev) * tx0, math.sqrt(a) * tx0])
    cross = math.sqrt(alpha) * (1 - a_prev)
    joint = np.block([[(1 - a_prev) * covariance, cross * covariance], [cross * covariance, (1 - a) * covariance]])
    known = np.repeat([False, True], pixels)
    x_t = mean[pixels:] + math.sqrt(1 - a) * operator @ np.random.default_rng(1).normal(size=pixels)
    expected_mean, expected_covariance = gaussian.condition(mean, joint, known, x_t)

    def as_image(vector):
        return torch.from_numpy(vector).view(1, 1, *size)

    t = torch.tensor([step])
    mean, variance = diffusion.posterior(as_image(tx0), as_image(x_t), t)
    torch.testing.assert_close(mean.flatten().numpy(), expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.item() * covariance, expected_covariance, rtol=1e-6, atol=1e-7)
    assert variance.shape == (1, 1, 1, 1)


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (32, 20)])
def test_q_sample_has_the_moments_of_the_forward_process(size):
    """Linear in the noise, so exact: unit noises give the columns of sqrt(1 - alpha_bar) sqrt(s_h s_w) T."""
    diffusion, pixels = build_diffusion(image_config()), size[0] * size[1]
    operator = torch.from_numpy(reference.matrix(size, (size[0] / 16, size[1] / 16)))
    x0 = randn((1, 1, *size), generator("cpu", 0)).double()
    t = torch.tensor([300])
    a = diffusion.schedule.alpha_bar[300]
    mean = diffusion.q_sample(x0, t, torch.zeros_like(x0))
    torch.testing.assert_close(mean.flatten(), a.sqrt() * (operator @ x0.flatten()))
    units = torch.eye(pixels, dtype=torch.float64).view(pixels, 1, *size)
    columns = diffusion.q_sample(x0.expand_as(units), t.expand(pixels), units) - mean
    covariance = columns.view(pixels, pixels).T @ columns.view(pixels, pixels)
    expected = (1 - a) * pixels / 16**2 * operator @ operator.T
    torch.testing.assert_close(covariance, expected)


def test_q_sample_without_mollifier_is_ddpm():
    x0, noise, t = draw((16, 16))
    for config in (image_config(gaussian_filter_std=0.0), image_config(mollifier_type="none")):
        diffusion = build_diffusion(config)
        a = diffusion.schedule.alpha_bar[t].view(-1, 1, 1, 1)
        expected = (a.sqrt() * x0 + (1 - a).sqrt() * noise).float()
        torch.testing.assert_close(diffusion.q_sample(x0, t, noise), expected)


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
@pytest.mark.parametrize("points, loss_type", [("full", "mse"), ("subset", "l1"), ("subset", "rescaled_mse")])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_network_that_knows_the_target_has_no_loss(mean_type, points, loss_type, learn_sigma):
    """With learned variance it also has to choose beta~, fraction -1."""
    config = image_config(model_mean_type=mean_type, loss_type=loss_type, learn_sigma=learn_sigma, multiscale_loss=True)
    diffusion = build_diffusion(config)
    x0, noise, t = draw((9, 14))
    coords = point_set(len(t), (9, 14), points)
    target = coords.gather(target_of(diffusion, x0, noise, t))

    def network(values, time):
        assert values.shape == target.shape and torch.equal(time, t.float())
        return torch.cat([target, -torch.ones_like(target)], dim=-1) if learn_sigma else target

    losses = diffusion.training_losses(network, x0, t, coords, noise)
    assert set(losses) == ({"loss", "mse", "vlb"} if learn_sigma else {"loss", "mse"})
    for value in losses.values():
        torch.testing.assert_close(value, torch.zeros(len(t)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_mean_error_at_the_points(dtype):
    x0, noise, t = draw((9, 14))
    coords = point_set(len(t), (9, 14), "subset")
    output = randn((len(t), coords.num_points, 3), generator("cpu", 3)).to(dtype)
    for loss_type, expected in (("mse", lambda e: e**2), ("l1", torch.abs)):
        diffusion = build_diffusion(image_config(loss_type=loss_type))
        losses = diffusion.training_losses(lambda values, time: output, x0, t, coords, noise)
        error = output.float() - coords.gather(target_of(diffusion, x0, noise, t))
        torch.testing.assert_close(losses["loss"], expected(error).mean(dim=(1, 2)))
        torch.testing.assert_close(losses["mse"], error.square().mean(dim=(1, 2)))
        assert losses["loss"].dtype == torch.float32


def test_multiscale_loss_is_added():
    x0, noise, t = draw((16, 16))
    coords = point_set(len(t), (16, 16), "subset")
    options = {"multiscale_max_img_size": 16}
    plain, both = (build_diffusion(image_config(multiscale_loss=on, **options)) for on in (False, True))
    zeros = torch.zeros(len(t), coords.num_points, 3)
    losses = [d.training_losses(lambda values, time: zeros, x0, t, coords, noise) for d in (plain, both)]
    extra = multiscale_loss(zeros, coords.gather(target_of(plain, x0, noise, t)), coords, 16)
    torch.testing.assert_close(losses[1]["loss"] - losses[0]["loss"], extra)
    assert torch.equal(losses[0]["mse"], losses[1]["mse"])


@pytest.mark.parametrize("points", ["full", "subset"])
def test_preconditioned_network_that_says_nothing_is_the_linear_predictor(points):
    diffusion, (x0, noise, t) = build_diffusion(image_config(precondition=True)), draw((16, 16))
    coords = point_set(len(t), (16, 16), points)
    a, v_n = diffusion.schedule.alpha_bar[t].view(-1, 1, 1), diffusion.mollifier.noise_variance
    x_t = coords.gather(diffusion.q_sample(x0, t, noise))
    target = coords.gather(target_of(diffusion, x0, noise, t))
    guess = (1 - a).sqrt() * v_n / (a * 0.25 + (1 - a) * v_n) * x_t
    losses = diffusion.training_losses(lambda values, time: torch.zeros_like(values), x0, t, coords, noise)
    torch.testing.assert_close(losses["loss"], (guess - target).square().mean(dim=(1, 2)).float())


def test_a_balanced_loss_weighs_the_steps_and_leaves_the_reported_error_alone():
    plain, balanced = (build_diffusion(image_config(precondition=True, balance_loss=on)) for on in (False, True))
    x0, noise, t = draw((16, 16))
    coords = point_set(len(t), (16, 16), "subset")
    a, b = (d.training_losses(lambda values, time: values, x0, t, coords, noise) for d in (plain, balanced))
    torch.testing.assert_close(b["loss"], a["loss"] * plain.parameterisation.balance(t, a["loss"]))
    torch.testing.assert_close(b["mse"], a["mse"])
    assert not torch.allclose(a["loss"], b["loss"])


def learned(**options):
    return build_diffusion(image_config(learn_sigma=True, **options))


@pytest.mark.parametrize("fraction, table", [(-1.0, "variance_small"), (1.0, "betas"), (0.0, None)])
def test_learned_variance_lies_between_the_two(fraction, table):
    diffusion, t = learned(), torch.arange(1000)
    coords = Coordinates.full(1000, (2, 2))
    denoise = diffusion.denoiser(lambda values, time: torch.full((1000, 4, 6), fraction), coords)
    _, variance = denoise.with_variance(torch.zeros(1000, 3, 2, 2), t)
    small, large = diffusion.schedule.variance_small, diffusion.schedule.betas
    variance = variance[:, 0, 0, 0].double()
    assert (small * (1 - 1e-5) <= variance).all() and (variance <= large * (1 + 1e-5)).all()
    expected = getattr(diffusion.schedule, table) if table else (small * large).sqrt()
    torch.testing.assert_close(variance, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sigma_small", [False, True])
def test_fixed_variance_is_the_one_of_the_config(sigma_small):
    diffusion = build_diffusion(image_config(sigma_small=sigma_small))
    t, coords = torch.arange(1, 1000), Coordinates.full(999, (1, 2))
    _, variance = diffusion.denoiser(lambda values, time: values, coords).with_variance(torch.zeros(999, 3, 1, 2), t)
    expected = diffusion.schedule.posterior_variance if sigma_small else diffusion.schedule.betas
    torch.testing.assert_close(variance.flatten().double(), expected[1:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_vlb_is_the_kl_of_the_pointwise_marginals(mean_type):
    """Full grid, an arbitrary network; both means from `posterior`, the divergence by numerical integration."""
    size = (3, 4)
    diffusion, (x0, noise, t) = learned(model_mean_type=mean_type), draw(size)
    coords = Coordinates.full(len(t), size)
    output = coords.gather(target_of(diffusion, x0, noise, t)) + 0.01 * randn((len(t), 12, 3), generator("cpu", 5))
    fraction = randn((len(t), 12, 3), generator("cpu", 6))

    def network(values, time):
        return torch.cat([output, fraction], dim=-1)

    losses = diffusion.training_losses(network, x0, t, coords, noise)
    x_t = diffusion.q_sample(x0, t, noise)
    estimate, variance_p = diffusion.denoiser(network, coords, clip=False).with_variance(x_t, t)
    mean_p, _ = diffusion.posterior(estimate, x_t, t)
    mean_q, variance_q = diffusion.posterior(diffusion.mollifier.blur(x0), x_t, t)
    v_n = diffusion.mollifier.noise_variance
    for b in (1, 2, 3, 4):
        divergences = [
            gaussian.kl(q.item(), variance_q[b].item() * v_n, p.item(), variance.item() * v_n, points=4001)
            for q, p, variance in zip(*(v[b].flatten().double() for v in (mean_q, mean_p, variance_p)), strict=True)
        ]
        assert losses["vlb"][b].item() == pytest.approx(np.mean(divergences) / math.log(2), rel=2e-3)


@pytest.mark.parametrize("loss_type, weight", [("mse", 1.0), ("rescaled_mse", 0.25)])
def test_bound_is_added_with_its_weight_and_trains_the_variance_alone(loss_type, weight):
    diffusion = learned(loss_type=loss_type, steps=250)
    x0, noise, _ = draw((9, 14))
    t, coords = torch.tensor([0, 1, 100, 248, 249]), point_set(5, (9, 14), "subset")
    output = torch.zeros(5, coords.num_points, 6, requires_grad=True)
    losses = diffusion.training_losses(lambda values, time: output, x0, t, coords, noise)
    torch.testing.assert_close(losses["loss"], losses["mse"] + weight * losses["vlb"])
    (gradient,) = torch.autograd.grad(losses["vlb"].sum(), output, retain_graph=True)
    assert (gradient[..., :3] == 0).all() and (gradient[..., 3:] != 0).any()
    (gradient,) = torch.autograd.grad((losses["loss"] - weight * losses["vlb"]).sum(), output)
    assert (gradient[..., :3] != 0).any() and gradient[..., 3:].abs().max() < 1e-6


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_denoiser_of_a_network_that_knows_the_target_is_t_x0(mean_type, learn_sigma):
    diffusion = build_diffusion(image_config(model_mean_type=mean_type, learn_sigma=learn_sigma), steps=5)
    x0, noise, _ = draw((9, 14), dtype=torch.float64)
    t, coords = torch.arange(5), Coordinates.full(5, (9, 14))
    target = coords.gather(target_of(diffusion, x0, noise, t))

    def network(values, time):
        torch.testing.assert_close(time, diffusion.schedule.timesteps.float())  # the original steps, respaced
        return torch.cat([target, target], dim=-1) if learn_sigma else target

    tx0, x_t = diffusion.mollifier.blur(x0), diffusion.q_sample(x0, t, noise)
    torch.testing.assert_close(diffusion.denoiser(network, coords, clip=False)(x_t, t), tx0, rtol=0, atol=1e-8)
    x0[:, :, :4] = 3  # outside [-1, 1]
    target = coords.gather(target_of(diffusion, x0, noise, t))
    tx0, x_t = diffusion.mollifier.blur(x0), diffusion.q_sample(x0, t, noise)
    assert tx0.abs().max() > 2
    torch.testing.assert_close(diffusion.denoiser(network, coords)(x_t, t), tx0.clamp(-1, 1), rtol=0, atol=1e-8)


def test_latents_are_plain_diffusion_of_vectors():
    diffusion = build_diffusion(latent_config())
    z, noise = (randn((4, 6), generator("cpu", seed)) for seed in (0, 1))
    t = torch.tensor([0, 10, 500, 999])
    a = diffusion.schedule.alpha_bar[t][:, None].float()
    expected = a.sqrt() * z + (1 - a).sqrt() * noise

    def network(values, time):
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
        return noise + 0.5

    losses = diffusion.training_losses(network, z, t, None, noise)
    torch.testing.assert_close(losses["loss"], torch.full((4,), 0.5))  # l1
    torch.testing.assert_close(losses["mse"], torch.full((4,), 0.25))
    t = torch.full((4,), 10)
    z_t = diffusion.q_sample(5 * z, t, noise)
    denoise = diffusion.denoiser(lambda values, time: noise, None, clip=False)
    torch.testing.assert_close(denoise(z_t, t), 5 * z, rtol=1e-4, atol=1e-4)
    mean, variance = diffusion.posterior(z, z_t, t)
    assert mean.shape == (4, 6) and variance.shape == (4, 1)


@pytest.mark.parametrize("options, message", [
    ({"precondition": True, "model_mean_type": "v"}, r"diffusion\.precondition=True"),
    ({"balance_loss": True}, r"diffusion\.balance_loss=True"),
])
def test_fields_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_diffusion(image_config(**options))


def test_a_denoiser_needs_every_pixel():
    with pytest.raises(ValueError, match="every pixel"):
        build_diffusion(image_config()).denoiser(lambda v, t: v, point_set(1, (8, 8), "subset"))
