"""Flow matching and jumps: samplers on the exact flow of a Gaussian field, and minimisers of the losses, untrained."""

import pytest
import torch

from data.coordinates import Coordinates
from diffusion.flow import Flow, FlowSchedule, jump_target, preconditioning, straight_path
from diffusion.mollifier import GaussianMollifier
from diffusion.samplers import advance, ddim, euler, euler_invert, heun, heun_invert, sample, velocity
from diffusion.timestep_samplers import JumpTimes
from tests.reference.gaussian_flow import GaussianFlow
from utils.rng import generator, rand, randn

SIZE = (6, 9)
MOLLIFIER = GaussianMollifier(0.7, SIZE)


def exact_flow():
    """A field whose spectrum falls with the wavenumber, and noise, both mollified (docs/method.md, 2.1)."""
    k1, k2 = torch.meshgrid(*(torch.arange(length).double() for length in SIZE), indexing="ij")
    kept = torch.exp(-((torch.pi * MOLLIFIER.sigma) ** 2) / 2 * ((k1 / SIZE[0]) ** 2 + (k2 / SIZE[1]) ** 2))
    return GaussianFlow(2 * kept / (1 + torch.hypot(k1, k2) / 3), kept)


FLOW = exact_flow()


class Exact:
    """A denoiser that knows the flow."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x, t):
        return FLOW.estimate(x, *[self.schedule.time(t[0].item())] * 2)

    def jump(self, x, t):
        return FLOW.estimate(x, self.schedule.time(t[0].item()), self.schedule.time(t[0].item() - 1))


def jump(denoise, x, schedule):
    return sample(denoise, x, Flow(schedule, MOLLIFIER, 0.25, jumps=True, sampler="jump"))


def start():
    return MOLLIFIER.noise_like(torch.empty(2, 3, *SIZE, dtype=torch.float64), generator("cpu", 0))


def last(states):
    *_, (_, x) = states
    return x


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_jumps_follow_the_exact_flow(steps):
    schedule, x = FlowSchedule(steps), start()
    states = list(jump(Exact(schedule), x, schedule))
    assert [t for t, _ in states] == list(reversed(range(steps)))
    for t, state in states:
        torch.testing.assert_close(state, FLOW.state(x, 0.0, schedule.time(t - 1)))


@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2)])
def test_the_error_of_solvers_falls_with_their_order(sampler, order):
    def error(steps):
        schedule, x = FlowSchedule(steps), start()
        return (last(sampler(Exact(schedule), x, schedule)) - FLOW.state(x, 0.0, 1.0)).norm().item()

    assert torch.tensor(error(100) / error(200)).log2().item() == pytest.approx(order, abs=0.15)
    assert error(200) < 0.05 * start().norm()


@pytest.mark.parametrize("sampler, order", [(euler_invert, 1), (heun_invert, 2)])
def test_inversions_end_in_the_noise_of_the_exact_flow(sampler, order):
    def error(steps):
        schedule, noise = FlowSchedule(steps), start()
        states = list(sampler(Exact(schedule), FLOW.state(noise, 0.0, 1.0), schedule))
        assert [t for t, _ in states] == list(range(steps))
        return (states[-1][1] - noise).norm().item()

    assert torch.tensor(error(200) / error(400)).log2().item() == pytest.approx(order, abs=0.15)
    assert error(400) < 0.05 * start().norm()


def test_euler_is_ddim_on_the_straight_path():
    schedule, x = FlowSchedule(7), start()
    states = (solver(Exact(schedule), x, schedule) for solver in (euler, ddim))
    for (_, ours), (_, other) in zip(*states, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("evaluations, steps", [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_heun_takes_the_evaluations_that_it_is_given(evaluations, steps):
    """Each is followed by a state, so that two solvers in lockstep see each other's."""
    schedule, seen = FlowSchedule(steps), []

    def denoise(x, t):
        seen.append(t[0].item())
        return FLOW.estimate(x, *[schedule.time(seen[-1])] * 2)

    states = []
    for _, x in heun(denoise, start(), schedule, evaluations):
        states.append(x)
        assert len(states) == len(seen)
    assert len(seen) == evaluations and min(seen) == 0


@pytest.mark.parametrize("sampler", [euler, heun, jump])
def test_the_last_state_is_the_last_estimate(sampler):
    class Clipped(Exact):
        def __call__(self, x, t):
            self.estimate = super().__call__(x, t).clamp(-0.1, 0.1)
            return self.estimate

        jump = __call__

    denoise = Clipped(FlowSchedule(4))
    x = last(sampler(denoise, start(), denoise.schedule))
    torch.testing.assert_close(x, denoise.estimate)
    assert x.abs().max() == pytest.approx(0.1)


def test_the_estimate_of_a_jump_is_an_average_over_its_trajectory():
    """With the weights (1 − τ)⁻², so that it lies within the range of the data; by the midpoint rule."""
    x, t, r = start(), 0.2, 0.9
    times = t + (r - t) * (torch.arange(1000).double() + 0.5) / 1000
    weights = (1 - times) ** -2 / ((1 - times) ** -2).sum()
    average = sum(weight * FLOW.estimate(FLOW.state(x, t, time), time, time)
                  for weight, time in zip(weights.tolist(), times.tolist(), strict=True))
    torch.testing.assert_close(FLOW.estimate(x, t, r), average, rtol=1e-4, atol=1e-5)


def test_the_network_takes_and_gives_unit_variance():
    """Of values with the two variances: c_in x_t, and what c_out divides; no linear estimate from x_t is better."""
    v_d, v_n = 0.3, 0.08
    end, noise = v_d**0.5 * randn((400_000,), generator("cpu", 0)), v_n**0.5 * randn((400_000,), generator("cpu", 1))
    for t in (0.0, 0.3, 0.8, 0.98):
        x = straight_path(end, noise, torch.full((400_000,), t))
        c_skip, c_in, c_out = preconditioning(torch.tensor(t), v_d, v_n)
        rest = end - c_skip * x
        assert (c_in * x).var().item() == pytest.approx(1, rel=0.02)
        assert (rest / c_out).var().item() == pytest.approx(1, rel=0.02)
        assert torch.corrcoef(torch.stack([rest, x]))[0, 1].item() == pytest.approx(0, abs=0.025)


def test_advance_and_velocity_are_each_others_slope():
    x, estimate = start(), -start().flip(0)
    small = (advance(x, estimate, 0.3, 0.3 + 1e-6) - x) / 1e-6
    torch.testing.assert_close(small, velocity(x, estimate, 0.3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(advance(x, estimate, 0.3, 1.0), estimate)


def test_the_jump_target_is_the_published_one():
    """α-Flow (arXiv 2510.20771): x_t + (1 − t)(α (D − N) + (1 − α) u(x_s, s, r)), with s = α r + (1 − α) t."""
    end, noise, estimate = (randn((5, 4, 3), generator("cpu", i)).double() for i in range(3))
    t = torch.tensor([0.0, 0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    r = torch.tensor([1.0, 0.5, 1.0, 0.8, 0.95], dtype=torch.float64)
    for alpha in (1.0, 0.5, 0.1):
        s = alpha * r + (1 - alpha) * t
        late = [value.view(-1, 1, 1) for value in (t, s)]
        average = (estimate - straight_path(end, noise, s)) / (1 - late[1]) if alpha < 1 else 0
        wanted = straight_path(end, noise, t) + (1 - late[0]) * (alpha * (end - noise) + (1 - alpha) * average)
        torch.testing.assert_close(jump_target(end, estimate, t, s, r), wanted)
    same = torch.full((5,), 0.3, dtype=torch.float64)
    assert torch.equal(jump_target(end, estimate, same, same, same), end)


def mean_target(x, t, s, r):
    """E[target | x_t = x] for the exact F of one coefficient: D and x_s given x_t are normal, and F is linear."""
    data, noise = 1.3, 0.6

    def factor(t, r):
        flow = GaussianFlow(torch.full((1, 1), data).double(), torch.full((1, 1), noise).double())
        return flow.estimate(torch.ones(1, 1).double(), t, r).item()

    end = factor(t, t) * x
    x_s = s * end + (1 - s) * (x - t * end) / (1 - t)  # E[T ξ | x_t] = (x_t − t E[D | x_t]) / (1 − t)
    columns = [torch.tensor([value]).double() for value in (end, factor(s, r) * x_s, t, s, r)]
    return jump_target(*columns).item(), factor(t, r) * x


def test_the_target_has_the_exact_estimate_as_its_mean():
    """At s = r it is flow matching, whose minimiser is E[D | x_t] whatever r; an exact F is reproduced for r = t at any
    α, and for r > t up to α²: D replaces a stretch of α (r − t), as a step of Euler's would."""
    matched, _ = mean_target(0.7, 0.2, 0.9, 0.9)
    _, exact = mean_target(0.7, 0.2, 0.2, 0.2)
    assert matched == pytest.approx(exact)

    def error(alpha, t, r):
        found, exact = mean_target(0.7, t, alpha * r + (1 - alpha) * t, r)
        return abs(found - exact)

    for t, r in ((0.0, 1.0), (0.2, 0.9), (0.6, 1.0)):
        assert error(0.01, t, r) < 1e-3
        assert torch.tensor(error(0.02, t, r) / error(0.01, t, r)).log2().item() == pytest.approx(2, abs=0.1)


def flow(**options):
    return Flow(FlowSchedule(10), MOLLIFIER, 0.25, **options)


TIMES = torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.3, 1.0], [0.2, 0.4, 0.7]])


def network(values, time):
    """Any function of a point: of its state and of both times."""
    time = time.view(len(values), -1).sum(1)[:, None, None]
    return (values * (1 + time / 1000)).sin() + 0.3 * values


@pytest.mark.parametrize("jumps, t", [(False, torch.tensor([0, 4, 9])), (True, TIMES)])
@pytest.mark.parametrize("multiscale", [None, 8])
def test_the_loss_is_the_same_for_points_in_any_order(jumps, t, multiscale):
    images, noise = (randn((3, 2, *SIZE), generator("cpu", i)) for i in range(2))
    index = Coordinates.random(3, SIZE, 20, generator=generator("cpu", 2)).index
    losses = [flow(jumps=jumps, multiscale_max_size=multiscale).training_losses(
        network, images, t, Coordinates(order, SIZE), noise) for order in (index, index.flip(1))]
    for name in losses[0]:
        torch.testing.assert_close(*(one[name] for one in losses))


def test_the_loss_on_all_points_is_the_mean_over_disjoint_subsets():
    images, noise = (randn((3, 2, *SIZE), generator("cpu", i)) for i in range(2))
    every = torch.randperm(SIZE[0] * SIZE[1], generator=generator("cpu", 2)).expand(3, -1)
    whole, *parts = (flow(jumps=True).training_losses(network, images, TIMES, Coordinates(index, SIZE), noise)["loss"]
                     for index in (every, *every.chunk(2, dim=1)))
    torch.testing.assert_close(whole, sum(parts) / 2)


def test_only_the_present_estimate_has_a_gradient():
    """Of a network that is one number: the derivative of the squared error with the target held fixed."""
    images, noise = (randn((3, 2, *SIZE), generator("cpu", i)).double() for i in range(2))
    coords, t = Coordinates.full(3, SIZE), TIMES.double()
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(own, later):
        weights = iter([later, own])
        return flow(jumps=True).training_losses(lambda values, time: next(weights) * values, images, t, coords, noise)

    gradient, = torch.autograd.grad(loss(weight, weight)["loss"].sum(), weight)
    step = 1e-6
    fixed = [loss(weight + sign * step, weight)["loss"].sum().item() for sign in (1, -1)]
    assert gradient.item() == pytest.approx((fixed[0] - fixed[1]) / (2 * step), rel=1e-6)


def test_a_network_that_knows_the_data_has_no_loss_and_samples_them():
    """F = T x_1 whatever the state, through the preconditioning; one evaluation is enough."""
    images, noise = (0.3 * randn((3, 2, *SIZE), generator("cpu", i)) for i in range(2))
    coords, one = Coordinates.full(3, SIZE), flow(jumps=True)

    def oracle(values, time):
        t = 1 - time[:, 0] / 1000
        c_skip, c_in, c_out = (c.view(-1, 1, 1) for c in one._preconditioning(t))
        return (coords.gather(MOLLIFIER.blur(images)) - c_skip * values / c_in) / c_out

    terms = one.training_losses(oracle, images, TIMES, coords, noise)
    assert max(value.abs().max().item() for value in terms.values()) < 1e-10
    denoise = one.denoiser(oracle, coords)
    for sampler in (euler, heun, jump):
        end = last(sampler(denoise, MOLLIFIER.blur(noise), one.schedule))
        torch.testing.assert_close(end, MOLLIFIER.blur(images))


def test_jump_times_are_ordered_and_shared_out_as_they_should_be():
    """Half flow matching, a quarter jumps to the end and a quarter between two uniforms in order."""
    times, uniform = JumpTimes(100), rand((20_000, 2), generator("cpu", 0))
    for step, alpha in ((0, 1.0), (15, 1.0), (42.5, 0.03**0.5), (70, 0.03), (100, 0.03)):
        assert times.alpha(step) == pytest.approx(alpha)
        drawn, weights = times.sample(uniform, step)
        t, s, r = drawn.double().unbind(1)
        assert (weights == 1).all() and t.min() >= 0 and r.max() <= 1 and t.max() < 0.98
        torch.testing.assert_close(s, alpha * r + (1 - alpha) * t, rtol=0, atol=1e-6)
        matching, to_end = r == t, r == 1
        assert matching.double().mean().item() == pytest.approx(0.5, abs=0.025)
        assert to_end.double().mean().item() == pytest.approx(0.25, abs=0.025)
        between = ~matching & ~to_end
        ordered = rand((20_000, 2), generator("cpu", 1)).double().sort(dim=1).values
        for share in (0.1, 0.5, 0.9):
            for ours, theirs in ((t[matching], rand((20_000,), generator("cpu", 2)).double()),
                                 (t[to_end], ordered[:, 0]), (t[between], ordered[:, 0]), (r[between], ordered[:, 1]),
                                 ((r - t)[between], ordered.diff(dim=1)[:, 0])):
                assert ours.quantile(share).item() == pytest.approx(theirs.quantile(share).item(), abs=0.025)
