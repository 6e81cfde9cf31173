"""Draws depend on their keys and on the sample alone."""

import pytest
import torch

from utils import rng


def test_a_sample_draws_the_same_in_any_batch():
    together = rng.randn((4, 3, 5), rng.sample_generators("cpu", [7, 8, 9, 10], 0, "noise"))
    apart = [rng.randn((2, 3, 5), rng.sample_generators("cpu", pair, 0, "noise")) for pair in ([7, 8], [9, 10])]
    assert torch.equal(together, torch.cat(apart))


def test_keys_make_different_streams():
    draws = {tuple(rng.rand((3,), rng.generator("cpu", *keys)).tolist())
             for keys in ((0, "t"), (1, "t"), (0, "noise"), (0, "t", 1), ("0", "t"))}
    assert len(draws) == 5


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    rng.randn((2, 3), rng.sample_generators("cpu", [0, 1], "x"))
    assert torch.equal(state, torch.get_rng_state())


def test_a_wrong_number_of_generators_is_refused():
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        rng.rand((2, 1), rng.sample_generators("cpu", range(3)))


def test_a_branch_is_a_stream_of_its_own():
    first, again = rng.generator("cpu", "x"), rng.generator("cpu", "x")
    rng.randn((1000,), rng.seeded(rng.draw_seed(first)))  # however much is drawn from it
    branched = rng.randn((4,), rng.seeded(rng.draw_seed(again)))
    assert torch.equal(rng.randn((3,), first), rng.randn((3,), again))
    assert not torch.equal(branched[:3], rng.randn((3,), rng.generator("cpu", "x")))
    together, alone = (rng.seeded(rng.draw_seed(rng.sample_generators("cpu", which, "x"))) for which in ([0, 1], [1]))
    assert torch.equal(rng.randn((2, 4), together)[1:], rng.randn((1, 4), alone))
