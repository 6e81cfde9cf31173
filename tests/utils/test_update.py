"""One update: what is left out, what that leaves untouched, and what is said about it."""

import logging
import math

import pytest
import torch
from torch import nn

from tests.tiny import tiny_config
from utils.optimiser import EMA, Update


class Rig:
    """An Update of a small network, and steps whose loss has one part for each of its two layers."""

    def __init__(self, dtype=torch.float32, **overrides):
        config = tiny_config(".")
        for name, value in overrides.items():
            section, field = name.split("__")
            config[section][field] = value
        torch.manual_seed(0)
        self.modules = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(4, 1)})
        self.update = Update(config, self.modules, torch.device("cpu"), dtype)
        self.count = 0

    def step(self, scale=1.0, slope=1.0):
        """A step whose loss is multiplied by `scale`, and whose gradient of the first layer by `slope` alone."""
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(self.count))
        hidden = self.modules["first"](x)
        hidden = hidden.detach() + Slope.apply(hidden - hidden.detach(), slope)
        terms = {"extra": torch.tensor(0.5), "loss": self.modules["second"](hidden).square().mean() * scale}
        self.update.backward(terms["loss"])
        applied, norm = self.update.apply(self.count, terms)
        self.count += 1
        return bool(applied), norm

    def everything(self):
        """Weights and moments, copied."""
        state = self.update.optimizer.state_dict()["state"]
        return [p.detach().clone() for p in self.modules.parameters()] + [
            value.clone() for moments in state.values() for value in moments.values()]


class Slope(torch.autograd.Function):
    """The identity, with its gradient multiplied by a number."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.slope = slope
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope, None


def same(a, b):
    return all(map(torch.equal, a, b)) and len(a) == len(b)


@pytest.mark.parametrize("bad, named", [
    ({"scale": math.nan}, "step 2, samples 8 to 11: loss term loss = nan;"),
    ({"scale": math.inf}, "step 2, samples 8 to 11: loss term loss = inf;"),
    ({"slope": math.nan}, "step 2, samples 8 to 11: gradient of first.weight = nan, gradient of first.bias = nan;"),
    ({"slope": math.inf}, "step 2, samples 8 to 11: gradient of first.weight = "),
])
def test_a_step_that_is_not_finite_stops_the_run_before_the_update_and_is_named(bad, named):
    rig = Rig()
    rig.step(), rig.step()
    before = rig.everything()
    with pytest.raises(FloatingPointError) as error:
        rig.step(**bad)
    assert named in str(error.value) and "train.nonfinite=skip" in str(error.value) and "\n" not in str(error.value)
    assert same(before, rig.everything())


def test_skipping_leaves_weights_moments_and_average_as_they_are(caplog):
    rig = Rig(train__nonfinite="skip")
    ema = EMA(rig.modules, 0.5, 1)
    rig.step(), ema.update(1), ema.update(2)
    rig_without = Rig()
    rig_without.step()
    before = rig.everything()
    with caplog.at_level(logging.WARNING):
        assert rig.step(scale=math.nan)[0] is False
    ema.update(3)
    assert same(before, rig.everything()) and rig.update.nonfinite == 1
    assert len(caplog.records) == 1
    assert "step 1, samples 4 to 7: loss term loss = nan; the step is left out" in caplog.text
    assert all(value.isfinite().all() for value in ema.modules.parameters())
    rig_without.count += 1  # that batch is not seen here
    assert rig.step()[0] and rig_without.step()[0]
    assert same(rig.everything(), rig_without.everything())  # also Adam's count of steps


def test_skips_in_a_row_are_bounded_and_a_good_step_starts_the_count_again():
    rig = Rig(train__nonfinite="skip", train__max_nonfinite_skips=2)
    for scale in (math.nan, math.nan, 1.0, math.nan, math.inf):
        rig.step(scale=scale)
    assert rig.update.nonfinite == 4
    again = Rig(train__nonfinite="skip", train__max_nonfinite_skips=2)
    again.update.load_state_dict(rig.update.state_dict())  # the count goes on where the run does
    for one in (rig, again):
        with pytest.raises(FloatingPointError, match="2 steps before it were left out in a row"):
            one.step(scale=math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_skip_counts_with_and_without_loss_scaling(dtype):
    rig = Rig(dtype, optimizer__gradient_skip=True, optimizer__gradient_skip_threshold=50.0)
    if dtype == torch.float16:
        rig.update.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert rig.step()[0]
    before = rig.everything()
    applied, norm = rig.step(scale=1e4)
    assert not applied and norm > 50  # of the gradient itself, without the loss scale
    assert same(before, rig.everything()) and rig.update.skipped == 1 and rig.update.nonfinite == 0
    assert rig.step()[0] and rig.update.skipped == 1  # it goes on
    off = Rig(dtype)
    assert off.step(scale=1e4)[0] and off.update.skipped == 0


def test_an_overflow_of_float16_lowers_the_scale_and_is_no_fault():
    rig = Rig(torch.float16)
    rig.step()
    before, scale = rig.everything(), rig.update.scaler.get_scale()
    assert rig.step(slope=math.inf)[0] is False
    assert same(before, rig.everything()) and rig.update.scaler.get_scale() == scale / 2
    assert rig.update.nonfinite == rig.update.skipped == 0
    assert rig.step()[0]
    # where there is no scale left to lower, it is not the scale's fault
    with pytest.raises(FloatingPointError, match="gradient of first.weight"):
        for _ in range(40):
            rig.step(slope=math.inf)
    with pytest.raises(FloatingPointError, match="loss term loss = nan"):
        Rig(torch.float16).step(scale=math.nan)


def test_state_comes_back_with_the_scale():
    rig = Rig(torch.float16, train__nonfinite="skip")
    rig.step(), rig.step(slope=math.inf), rig.step(scale=math.nan)
    other = Rig(torch.float16)
    other.modules.load_state_dict(rig.modules.state_dict())
    other.update.load_state_dict(rig.update.state_dict())
    assert other.update.scaler.get_scale() == rig.update.scaler.get_scale() == 2.0**14
    assert other.update.nonfinite == 1 and same(rig.everything(), other.everything())


def test_gradients_are_gone_after_a_step_and_a_layer_may_have_none():
    rig = Rig()
    rig.modules["first"].weight.requires_grad_(False)
    before = rig.modules["first"].weight.clone()
    assert rig.step()[0] and torch.equal(rig.modules["first"].weight, before)
    weights = [weight for group in rig.update.optimizer.param_groups for weight in group["params"]]
    assert all(weight.grad is None for weight in [*weights, *rig.modules.parameters()])


def test_weight_decay_is_that_of_the_config():
    ends = []
    for decay in (0.0, 0.5):
        rig = Rig(optimizer__learning_rate=0.1, optimizer__warmup_steps=0)
        rig.update.config.optimizer.weight_decay = decay
        rig.update = Update(rig.update.config, rig.modules, torch.device("cpu"), torch.float32)
        before = rig.modules["first"].weight.detach().clone()
        rig.step()
        ends.append(rig.modules["first"].weight.detach())
    torch.testing.assert_close(ends[0] - ends[1], 0.1 * 0.5 * before)


def test_reports_of_a_gpu_are_looked_at_one_step_later(monkeypatch):
    rig = Rig(train__nonfinite="skip")
    settle = rig.update.settle
    monkeypatch.setattr(rig.update, "settle", lambda behind=0: settle(behind=1))  # what apply() asks for on a GPU
    rig.step(scale=math.nan)
    assert rig.update.nonfinite == 0
    rig.step()
    assert rig.update.nonfinite == 1
    rig.step(scale=math.nan)
    settle()  # what comes before a checkpoint
    assert rig.update.nonfinite == 2
