"""Time-step samplers: distribution, unbiased weights, and steps that are functions of their draws alone."""

import pytest
import torch

from configs.defaults import autoencoder_config, latent_config
from diffusion.timestep_samplers import LossSecondMomentSampler, UniformSampler, build_timestep_sampler
from utils.errors import UserError
from utils.rng import generator, rand, sample_generators

STEPS = 20


def draws(indices):
    """Uniform draws, a function of each index."""
    return rand((len(indices), 2), sample_generators("cpu", indices, "t"))


def loss_of(t):
    return 0.1 + (t - 5.0) ** 2 / 50


def informed(seed=0):
    """A sampler that has seen every step more than often enough."""
    sampler = LossSecondMomentSampler(STEPS)
    for _ in range(12):
        t = torch.randperm(STEPS, generator=generator("cpu", seed))
        sampler.update(t, loss_of(t))
    return sampler


def test_uniform_draws_every_step_equally_often_with_weight_1():
    t, weights = UniformSampler(STEPS).sample(draws(range(8000)), 0)
    counts = torch.bincount(t, minlength=STEPS)
    assert t.dtype == torch.int64 and weights.dtype == torch.float32 and (weights == 1).all()
    assert counts.shape == (STEPS,) and (counts - 400).abs().max() < 100


def test_loss_second_moment_is_uniform_until_every_step_has_ten_losses():
    sampler = LossSecondMomentSampler(STEPS)
    for round_ in range(10):
        torch.testing.assert_close(sampler.probabilities(), torch.full((STEPS,), 1 / STEPS, dtype=torch.float64))
        t = torch.arange(STEPS - 1) if round_ == 9 else torch.arange(STEPS)
        sampler.update(t, loss_of(t))
    assert (sampler.sample(draws(range(9)), 0)[1] == 1).all()
    sampler.update(torch.tensor([STEPS - 1]), torch.tensor([1.0]))
    assert sampler.probabilities().std() > 0


def test_probabilities_follow_the_root_mean_square_of_the_losses():
    losses = loss_of(torch.arange(STEPS).double())
    expected = 0.999 * losses / losses.sum() + 0.001 / STEPS
    torch.testing.assert_close(informed().probabilities(), expected, rtol=1e-6, atol=0)


def test_draws_follow_the_probabilities():
    sampler = informed()
    counts = torch.bincount(sampler.sample(draws(range(8000)), 0)[0], minlength=STEPS)
    expected = 8000 * sampler.probabilities()
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 5).all()


def test_weighted_loss_is_unbiased():
    """Exactly, as a sum over the probabilities, and by draws."""
    sampler, steps = informed(), torch.arange(STEPS).double()
    other = torch.sin(steps) + 2  # any function of the step, not just the loss it was told
    t, weights = sampler.sample(draws(range(8000)), 0)
    exact_weights = torch.zeros(STEPS).double()
    exact_weights[t] = weights.double()
    probabilities = sampler.probabilities()
    drawn = exact_weights > 0
    torch.testing.assert_close((probabilities * exact_weights)[drawn], torch.full_like(other, 1 / STEPS)[drawn])
    assert (weights * other[t]).mean().item() == pytest.approx(other.mean().item(), rel=0.05)


def test_a_step_depends_on_its_own_draw_alone():
    for sampler in (UniformSampler(1000), informed()):
        together, weights = sampler.sample(draws([3, 8, 5]), 0)
        alone = [sampler.sample(draws([i]), 0) for i in (3, 8, 5)]
        assert together.tolist() == [t.item() for t, _ in alone]
        assert weights.tolist() == [w.item() for _, w in alone]


def test_history_keeps_the_last_ten_losses_of_a_step():
    """Against lists, with steps that repeat within a batch, even more often than the history is long."""
    sampler, lists, source = LossSecondMomentSampler(3), [[], [], []], generator("cpu", 0)
    for size in (1, 50, 7, 3, 40, 20):
        t = torch.randint(3, (size,), generator=source)
        losses = torch.rand(size, generator=source)
        sampler.update(t, losses)
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            lists[step] = (lists[step] + [loss])[-10:]
        kept = sampler.state_dict()["losses"]
        for step in range(3):
            expected = sorted([0.0] * (10 - len(lists[step])) + lists[step])
            assert kept[step].sort().values.tolist() == pytest.approx(expected)


def test_what_is_recorded_counts_from_the_end_of_the_step():
    sampler, twin = informed(), informed()
    t = torch.tensor([4, 4, 2, 7])
    for part in (slice(0, 3), slice(3, 4)):
        sampler.record(t[part], 5 * loss_of(t[part]))
    assert torch.equal(sampler.probabilities(), twin.probabilities())
    sampler.end_step()
    twin.update(t, 5 * loss_of(t))
    assert torch.equal(sampler.probabilities(), twin.probabilities())
    sampler.record(t, loss_of(t))
    sampler.end_step()
    twin.update(t, loss_of(t))  # and not what was taken in before
    assert torch.equal(sampler.probabilities(), twin.probabilities())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_left_out(bad):
    sampler, twin = informed(), informed()
    sampler.update(torch.tensor([4, 4, 2]), torch.tensor([0.5, bad, 0.25]))
    twin.update(torch.tensor([4, 2]), torch.tensor([0.5, 0.25]))
    assert torch.equal(sampler.probabilities(), twin.probabilities())


def test_state_survives_a_round_trip():
    sampler, copy = informed(), LossSecondMomentSampler(STEPS)
    copy.load_state_dict(sampler.state_dict())
    for t in (torch.tensor([1, 1, 7]), torch.arange(STEPS)):
        assert torch.equal(sampler.probabilities(), copy.probabilities())
        sampler.update(t, 2 * loss_of(t))
        copy.update(t, 2 * loss_of(t))
    assert torch.equal(sampler.probabilities(), copy.probabilities())
    state = sampler.state_dict()
    sampler.update(torch.tensor([0]), torch.tensor([9.0]))
    assert not torch.equal(state["losses"], sampler.state_dict()["losses"])  # a state is a copy


def test_the_state_of_another_sampler_is_a_user_error():
    UniformSampler(STEPS).load_state_dict(UniformSampler(STEPS).state_dict())
    with pytest.raises(UserError, match="schedule_sampler='uniform'"):
        UniformSampler(STEPS).load_state_dict(informed().state_dict())
    for state in ({}, LossSecondMomentSampler(STEPS + 1).state_dict()):
        with pytest.raises(UserError, match=f"diffusion.steps={STEPS}"):
            LossSecondMomentSampler(STEPS).load_state_dict(state)


def test_is_built_from_either_config():
    for config in (autoencoder_config(32), latent_config()):
        assert type(build_timestep_sampler(config)) is UniformSampler
        config.diffusion.schedule_sampler = "loss-second-moment"
        config.diffusion.steps = 30
        sampler = build_timestep_sampler(config)
        assert isinstance(sampler, LossSecondMomentSampler) and sampler.steps == 30
