"""Guidance on denoisers with a known answer: linear ones, whose gradients and conditional distributions are closed."""

import functools

import numpy as np
import pytest
import torch

from data.coordinates import Coordinates
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.guidance import Consistent, Constraint, guided_ddim
from diffusion.mollifier import GaussianMollifier
from diffusion.operators import Downsampling, Mask
from diffusion.samplers import ddim, ddim_step, ddpm
from diffusion.schedules import Schedule, make_betas, respaced_timesteps
from tests.models.tiny import tiny_config, tiny_decoder
from tests.reference.gaussian import condition
from utils.rng import generator, randn

SIZES = [((16, 16), (8, 8)), ((15, 20), (5, 8)), ((12, 9), (12, 4)), ((33, 21), (32, 21))]


def schedule_of(steps):
    return Schedule.from_betas(make_betas("cosine", 1000), respaced_timesteps(1000, steps))


def draw(*shape, seed=0):
    return randn(shape, generator("cpu", seed)).double()


def known_pixels(batch, size, seed=0):
    return draw(batch, 1, *size, seed=seed) > 0


def constraint_of(sigma=1.0, size=(6, 7), batch=2, seed=0):
    operator = Mask(known_pixels(batch, size, seed))
    data = operator.A(draw(batch, 3, *size, seed=seed + 1))
    return Constraint(operator, data, GaussianMollifier(sigma, size))


@pytest.mark.parametrize("size, low_size", SIZES)
def test_enforcing_reproduces_the_smaller_image(size, low_size):
    """Of an image that exists, from another one, however wrong: within the range of pixels."""
    operator = Downsampling(size, low_size)
    low = operator.A(draw(2, 3, *size).sigmoid() - 0.5)
    image = Constraint(operator, low, GaussianMollifier(1.0, size)).enforce(draw(2, 3, *size, seed=1).clamp(-1, 1))
    assert image.abs().max() <= 1
    assert (operator.A(image) - low).abs().max() < 1e-3


def test_enforcing_keeps_known_pixels_and_leaves_the_others():
    constraint = constraint_of()
    constraint.data = constraint.data.clamp(-1, 1)
    image, known = draw(2, 3, 6, 7, seed=5).clamp(-1, 1), constraint.operator.known.expand(2, 3, 6, 7)
    result = constraint.enforce(image)
    assert torch.equal(result[~known], image[~known])
    torch.testing.assert_close(result[known], constraint.data[known])


def test_the_gap_is_the_mollified_change_of_known_pixels():
    """It closes it where the filter is exact, and no unknown pixel of the true image has a part in it."""
    constraint, tx0 = constraint_of(sigma=0.0), draw(2, 3, 6, 7, seed=5)
    closed = tx0 + constraint.gap(tx0)
    torch.testing.assert_close(constraint.operator.A(closed), constraint.data)
    mollified = constraint_of(sigma=1.5)
    blur, sharpen = mollified.mollifier.blur, mollified.mollifier.sharpen
    full = torch.where(mollified.operator.known, mollified.data, sharpen(tx0))  # x-bar: the estimate where not known
    torch.testing.assert_close(mollified.gap(tx0), blur(full) - blur(sharpen(tx0)))


def numerical_gradient(function, x, step=1e-5):
    gradient = torch.empty_like(x).flatten()
    for i in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=x.dtype)
        shift[i] = step
        shift = shift.view_as(x)
        gradient[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient.view_as(x)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_guidance_is_the_gradient_of_the_mismatch(sigma):
    """x_{t−1} is that of DDIM less λ ∇ ‖m ⊙ (T x̂_0(x_t) − T x̄)‖² or, limited, λ c T T* ∇ ‖m ⊙ (x̂_0(x_t) − y)‖², by
    finite differences, at four times the training resolution; c = 4 unless T is the identity."""
    constraint, schedule, x, scale = constraint_of(sigma, (4, 4)), schedule_of(5), draw(2, 3, 4, 4), 1e-3
    constraint.mollifier = GaussianMollifier(sigma, (4, 1))
    mixing = draw(16, 16, seed=7)

    def denoise(x, t):
        return (x.flatten(2) @ mixing).view_as(x).sin()

    target = denoise(x, None) + constraint.gap(denoise(x, None))

    def mismatch(x):
        return (constraint.operator.known * (denoise(x, None) - target)).square().sum()

    def misfit(x):
        return (constraint.operator.A(constraint.mollifier.sharpen(denoise(x, None))) - constraint.data).square().sum()

    _, plain = next(ddim(denoise, x, schedule))
    _, published = next(guided_ddim(denoise, x, schedule, constraint, scale))
    torch.testing.assert_close(plain - published, scale * numerical_gradient(mismatch, x), rtol=1e-5, atol=1e-9)
    _, state = next(guided_ddim(denoise, x, schedule, constraint, scale, limited=True))
    mollified = constraint.mollifier.blur(constraint.mollifier.blur(numerical_gradient(misfit, x)))
    expected = scale * mollified * (4 if sigma else 1)
    assert expected.norm() > 1e-4
    longest = schedule.alpha_bar[-2].sqrt() * constraint.gap(denoise(x, None)).flatten(1).norm(dim=1)
    assert (expected.flatten(1).norm(dim=1) < longest).all()  # so that the limit plays no part
    torch.testing.assert_close(plain - state, expected, rtol=1e-5, atol=1e-9)


def test_guidance_moves_no_further_than_the_gap():
    """A denoiser as steep as the first step's: each image moves by sqrt(alpha_bar) times the norm of its own gap."""
    constraint, schedule, x = constraint_of(), schedule_of(5), draw(2, 3, 6, 7)

    def denoise(x, t):
        return 2e4 * x

    _, state = next(guided_ddim(denoise, x, schedule, constraint, 1.0, limited=True))
    _, plain = next(ddim(denoise, x, schedule))
    moved, gap = ((plain - state).flatten(1).norm(dim=1), constraint.gap(denoise(x, None)).flatten(1).norm(dim=1))
    torch.testing.assert_close(moved, schedule.alpha_bar[-2].sqrt() * gap)


def test_nothing_known_or_no_guidance_is_plain_ddim():
    schedule, x, constraint = schedule_of(6), draw(2, 3, 6, 7), constraint_of()
    blank = Constraint(Mask(torch.zeros(2, 1, 6, 7, dtype=torch.bool)), torch.zeros(()), constraint.mollifier)
    plain = [state for _, state in ddim(lambda x, t: 0.5 * x, x, schedule)]
    for options in ((blank, 1.0, False, 1.0), (blank, 1.0, True), (constraint, 0.0)):
        for (_, ours), expected in zip(guided_ddim(lambda x, t: 0.5 * x, x, schedule, *options), plain, strict=True):
            torch.testing.assert_close(ours, expected)


def test_jumps_repeat_every_step_but_the_last_with_fresh_noise():
    schedule, x, seen, constraint = schedule_of(4), draw(2, 3, 6, 7), [], constraint_of()

    def denoise(x, t):
        assert t.shape == (2,) and t.dtype == torch.int64
        seen.append(t[0].item())
        return 0.5 * x

    def noise_like(x, source):
        return constraint.mollifier.noise_like(x, source)

    path = list(guided_ddim(denoise, x, schedule, constraint, 0.0, False, 0.0, 2, generator("cpu", 3), noise_like))
    assert [t for t, _ in path] == [3, 2, 1, 0] and seen == [3, 3, 3, 2, 2, 2, 1, 1, 1, 0]
    # the last step before the first yield, from the forward process: q(x_t | x_{t-1}) = N(sqrt(a / a_prev) x, ...)
    source, (a, a_prev), state = generator("cpu", 3), schedule.alpha_bar[[-1, -2]], x
    now, after = ((value.sqrt().item(), (1 - value).sqrt().item()) for value in (a, a_prev))
    for repeat in range(3):
        if repeat:
            state = (a / a_prev).sqrt() * state + (1 - a / a_prev).sqrt() * noise_like(state, source)
        state = ddim_step(state, 0.5 * state, now, after)
    torch.testing.assert_close(path[0][1], state)


def normal_problem(side=4):
    """Normal images on a grid with smooth covariance, half of whose pixels are known: (covariance, known, values)."""
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    covariance = 0.25 * torch.exp(-0.5 * torch.cdist(place, place).square() / 1.5**2) + 1e-3 * torch.eye(side**2)
    known = torch.arange(side**2) % side < side // 2
    value = torch.linalg.cholesky(covariance) @ draw(side**2, seed=11)
    return covariance, known, value


@functools.cache
def inpainted(guidance, jumps):
    """Many samples of the unknown pixels of `normal_problem`, [N, unknown]."""
    covariance, known, value = normal_problem()
    side, count, schedule = 4, 2000, schedule_of(40)

    def denoise(x, t):  # E[x_0 | x_t], the best denoiser
        a = schedule.alpha_bar[t[0]]
        gain = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(side**2))
        return (x.flatten(1) @ gain).view_as(x)

    operator = Mask(known.view(1, 1, side, side).expand(count, -1, -1, -1))
    constraint = Constraint(operator, operator.A(value.view(1, 1, side, side)), GaussianMollifier(0.0))
    path = guided_ddim(denoise, draw(count, 1, side, side), schedule, constraint, guidance, True, 1.0, jumps,
                       generator("cpu", 1))
    *_, (_, x) = path
    torch.testing.assert_close(x.flatten(1)[:, known], value[known].expand(count, -1))
    return x.flatten(1)[:, ~known]


def conditional():
    covariance, known, value = normal_problem()
    zeros = np.zeros(len(value))
    return condition(zeros, covariance.numpy(), known.numpy(), value[known].numpy())


def mean_error(samples):
    """Root mean square, over the unknown pixels, of what the mean of the samples is off the conditional one."""
    return np.square(samples.numpy().mean(0) - conditional()[0]).mean() ** 0.5


def test_inpainting_of_normal_images_has_their_conditional_distribution():
    """Nearly, as one lambda for all steps is no exact rule. With the best denoiser, and all three together."""
    mean, covariance = conditional()
    samples = inpainted(0.3, 3)
    assert np.square(mean).mean() ** 0.5 > 0.4 and covariance.diagonal().max() > 0.15
    assert mean_error(samples) < 0.05
    found = np.cov(samples.numpy().T)
    assert np.abs(found - covariance).max() < 0.06 and 0.75 < np.trace(found) / np.trace(covariance) < 1.2


@pytest.mark.parametrize("guidance, jumps", [(0.3, 0), (0.0, 3)])
def test_guidance_and_jumps_each_bring_the_unknown_in_tune_with_the_known(guidance, jumps):
    assert mean_error(inpainted(guidance, jumps)) < 0.8 * mean_error(inpainted(0.0, 0))


def test_super_resolution_of_normal_images_is_nearer_to_their_conditional_mean_than_interpolation():
    """The mean of samples whose estimates meet the data; A⁺y is the smallest image that does."""
    side, count, schedule = 8, 500, schedule_of(50)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    covariance = 0.25 * torch.exp(-torch.cdist(place, place) / 3)
    operator = Downsampling((side, side), (4, 4))
    low = operator.A((torch.linalg.cholesky(covariance) @ draw(side**2, seed=11)).view(1, 1, side, side))
    matrix = operator.A(torch.eye(side**2, dtype=torch.float64).view(-1, 1, side, side)).flatten(1).T  # A
    gain = covariance @ matrix.T @ torch.linalg.inv(matrix @ covariance @ matrix.T)
    mean = (gain @ low.flatten()).view(side, side)

    def denoise(x, t):
        a = schedule.alpha_bar[t[0]]
        best = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(side**2))
        return (x.flatten(1) @ best).view_as(x)

    denoise = Consistent(denoise, Constraint(operator, low, GaussianMollifier(0.0)))
    *_, (_, x) = ddim(denoise, draw(count, 1, side, side), schedule, 1.0, generator("cpu", 1))
    torch.testing.assert_close(operator.A(x), low.expand(count, -1, -1, -1))
    ours, plain = ((estimate - mean).square().mean().sqrt() for estimate in
                   (x.mean((0, 1)), operator.pseudo_inverse(low)[0, 0]))
    assert ours < 0.5 * plain


def test_consistent_estimates_meet_the_data_whatever_the_sampler():
    constraint, schedule = constraint_of(sigma=0.0), schedule_of(6)

    class Oracle:
        def __call__(self, x, t):
            return 0.5 * x

        def with_variance(self, x, t):
            return 0.5 * x, schedule.posterior_variance[t].view(-1, 1, 1, 1)

    denoise, x = Consistent(Oracle(), constraint), draw(2, 3, 6, 7)
    estimate, variance = denoise.with_variance(x, torch.tensor([3, 3]))
    assert torch.equal(estimate, denoise(x, torch.tensor([3, 3])))
    assert torch.equal(variance.flatten(), schedule.posterior_variance[[3, 3]])
    for sampler in (ddim, ddpm):
        *_, (_, result) = sampler(denoise, x, schedule, generator=generator("cpu", 0))
        torch.testing.assert_close(constraint.operator.A(result), constraint.data)
    half = Consistent(Oracle(), constraint, 0.5)(x, torch.tensor([3, 3]))
    torch.testing.assert_close(half, (Oracle()(x, None) + estimate) / 2)


@pytest.mark.parametrize("backend", [pytest.param("auto", marks=pytest.mark.slow), "torch_dense"])
def test_the_estimate_has_a_gradient_in_the_state(backend):
    """Along a random direction, by finite differences in float64, through a decoder whose weights are frozen."""
    decoder = tiny_decoder(backend=backend).double().requires_grad_(False)
    diffusion, coords = build_diffusion(tiny_config(), steps=10), Coordinates.full(2, (9, 12))
    z = draw(2, 6, seed=3)
    denoise = diffusion.denoiser(lambda values, t: decoder(values, t.double(), z, coords), coords, clip=False)
    x, along, weight = (draw(2, 3, 9, 12, seed=seed) for seed in (4, 5, 6))
    t = torch.tensor([2, 5])
    x.requires_grad_()
    gradient, = torch.autograd.grad((weight * denoise(x, t)).sum(), x)
    with torch.no_grad():
        ahead, behind = ((weight * denoise(x + step * along, t)).sum() for step in (1e-4, -1e-4))
    torch.testing.assert_close((gradient * along).sum(), (ahead - behind) / 2e-4, rtol=1e-4, atol=1e-4)
