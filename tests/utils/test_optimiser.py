"""Optimiser steps: their update, which steps are skipped, and what a skipped step leaves unchanged; the EMA."""

import copy
import logging
import math

import pytest
import torch
from torch import nn

from tests.tiny import tiny_config
from utils.optimiser import EMA, Optimiser, learning_rate


class Rig:
    """An Optimiser of two networks in sequence."""

    def __init__(self, dtype=torch.float32, weight_decay=0.0, **overrides):
        config = tiny_config(".")
        for name, value in overrides.items():
            section, field = name.split("__")
            config[section][field] = value
        config.optimizer.weight_decay = weight_decay
        torch.manual_seed(0)
        self.modules = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(4, 1)})
        self.optimiser = Optimiser(config, self.modules, torch.device("cpu"), dtype)
        self.count = 0

    def step(self, scale=1.0, slope=1.0):
        """A step with the loss multiplied by `scale`, and the gradient of the first network by `slope`."""
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(self.count))
        hidden = self.modules["first"](x)
        hidden = hidden.detach() + Slope.apply(hidden - hidden.detach(), slope)
        terms = {"extra": torch.tensor(0.5), "loss": self.modules["second"](hidden).square().mean() * scale}
        self.optimiser.backward(terms["loss"])
        applied, norm = self.optimiser.apply(self.count, terms)
        self.count += 1
        return bool(applied), norm

    def everything(self):
        """Weights and moments, copied."""
        state = self.optimiser.adamw.state_dict()["state"]
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


@pytest.mark.parametrize("limit", [0.05, 0.0])
def test_steps_equal_plain_adamw_with_each_networks_gradient_clipped(limit):
    rig = Rig(weight_decay=0.3, optimizer__clip_gradient_norm=limit, optimizer__learning_rate=0.1)
    networks = copy.deepcopy(rig.modules)
    plain = torch.optim.AdamW(networks.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.3, foreach=False)
    for number in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        networks["second"](networks["first"](x)).square().mean().backward()
        squares = [sum(p.grad.square().sum() for p in network.parameters()) for network in networks.values()]
        assert all(square.sqrt() > 0.05 for square in squares)
        for network, square in zip(networks.values(), squares, strict=True):
            for p in network.parameters():
                p.grad *= limit / square.sqrt() if limit else 1.0
        plain.step()
        plain.zero_grad()
        assert rig.step()[1] == pytest.approx(sum(squares).sqrt().item(), rel=1e-5)
    for one, other in zip(rig.modules.parameters(), networks.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad, named", [
    ({"scale": math.nan}, "step 2, samples 8 to 11: loss term loss = nan, "),
    ({"scale": math.inf}, "step 2, samples 8 to 11: loss term loss = inf, "),
    ({"slope": math.nan}, "step 2, samples 8 to 11: gradient norm of first = nan;"),
    ({"slope": math.inf}, "step 2, samples 8 to 11: gradient norm of first = "),
])
def test_a_step_that_is_not_finite_stops_the_run_before_the_update_and_is_named(bad, named):
    rig = Rig()
    rig.step(), rig.step()
    before = rig.everything()
    with pytest.raises(FloatingPointError) as error:
        rig.step(**bad)
    assert named in str(error.value) and "train.nonfinite=skip" in str(error.value) and "\n" not in str(error.value)
    assert same(before, rig.everything())


def test_skipping_leaves_weights_moments_and_average_unchanged(caplog):
    rig = Rig(train__nonfinite="skip")
    ema = EMA(rig.modules, 0.5, 1)
    rig.step(), ema.update(1), ema.update(2)
    rig_without = Rig()
    rig_without.step()
    before = rig.everything()
    with caplog.at_level(logging.WARNING):
        assert rig.step(scale=math.nan)[0] is False
    ema.update(3)
    assert same(before, rig.everything()) and rig.optimiser.nonfinite == 1
    assert len(caplog.records) == 1
    assert "step 1, samples 4 to 7: loss term loss = nan" in caplog.text and "the step is skipped" in caplog.text
    assert all(value.isfinite().all() for value in ema.modules.parameters())
    rig_without.count += 1  # that batch is not seen here
    assert rig.step()[0] and rig_without.step()[0]
    assert same(rig.everything(), rig_without.everything())  # also Adam's count of steps


def test_skips_in_a_row_are_bounded_and_a_good_step_restarts_the_count():
    rig = Rig(train__nonfinite="skip", train__max_nonfinite_skips=2)
    for scale in (math.nan, math.nan, 1.0, math.nan, math.inf):
        rig.step(scale=scale)
    assert rig.optimiser.nonfinite == 4
    again = Rig(train__nonfinite="skip", train__max_nonfinite_skips=2)
    again.optimiser.load_state_dict(rig.optimiser.state_dict())  # the count survives a restart
    for one in (rig, again):
        with pytest.raises(FloatingPointError, match="the 2 steps before it were skipped as well"):
            one.step(scale=math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_gradients_are_skipped_and_counted_with_and_without_loss_scaling(dtype):
    rig = Rig(dtype, optimizer__gradient_skip=True, optimizer__gradient_skip_threshold=50.0)
    if dtype == torch.float16:
        rig.optimiser.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert rig.step()[0]
    before = rig.everything()
    applied, norm = rig.step(scale=1e4)
    assert not applied and norm > 50  # the norm of the gradient itself, without the loss scale
    assert same(before, rig.everything()) and rig.optimiser.skipped == 1 and rig.optimiser.nonfinite == 0
    assert rig.step()[0] and rig.optimiser.skipped == 1
    off = Rig(dtype)
    assert off.step(scale=1e4)[0] and off.optimiser.skipped == 0


def test_an_overflow_of_float16_lowers_the_scale_and_is_no_fault():
    rig = Rig(torch.float16)
    rig.step()
    before, scale = rig.everything(), rig.optimiser.scaler.get_scale()
    assert rig.step(slope=math.inf)[0] is False
    assert same(before, rig.everything()) and rig.optimiser.scaler.get_scale() == scale / 2
    assert rig.optimiser.nonfinite == rig.optimiser.skipped == 0
    assert rig.step()[0]
    with pytest.raises(FloatingPointError, match="gradient norm of first"):  # the scale cannot fall below 1
        for _ in range(40):
            rig.step(slope=math.inf)
    with pytest.raises(FloatingPointError, match="loss term loss = nan"):
        Rig(torch.float16).step(scale=math.nan)


def test_state_comes_back_with_the_scale():
    rig = Rig(torch.float16, train__nonfinite="skip")
    rig.step(), rig.step(slope=math.inf), rig.step(scale=math.nan)
    other = Rig(torch.float16)
    other.modules.load_state_dict(rig.modules.state_dict())
    other.optimiser.load_state_dict(rig.optimiser.state_dict())
    assert other.optimiser.scaler.get_scale() == rig.optimiser.scaler.get_scale() == 2.0**14
    assert other.optimiser.nonfinite == 1 and same(rig.everything(), other.everything())


def test_moments_fit_weights_of_another_memory_layout():
    """Fused AdamW pairs numbers by their place in memory."""
    def stepped(layout, weights=None, state=None):
        modules = nn.ModuleDict({"net": nn.Conv2d(4, 6, 3)})
        modules.load_state_dict(weights or {"net.weight": torch.linspace(-1, 1, 216).view(6, 4, 3, 3),
                                            "net.bias": torch.zeros(6)})
        modules.to(memory_format=layout)
        optimiser = Optimiser(tiny_config("."), modules, torch.device("cpu"), torch.float32)
        if state:
            optimiser.load_state_dict(copy.deepcopy(state))
        x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1 if state else 0))
        loss = modules["net"](x).square().mean()
        optimiser.backward(loss)
        optimiser.apply(0, {"loss": loss})
        return copy.deepcopy(modules.state_dict()), optimiser.state_dict()

    first = stepped(torch.contiguous_format)
    expected, found = (stepped(layout, *first)[0] for layout in (torch.contiguous_format, torch.channels_last))
    torch.testing.assert_close(found, expected)


def test_reports_of_a_gpu_are_checked_one_step_later(monkeypatch):
    rig = Rig(train__nonfinite="skip")
    settle = rig.optimiser.settle
    monkeypatch.setattr(rig.optimiser, "settle", lambda behind=0: settle(behind=1))  # what apply() asks for on a GPU
    rig.step(scale=math.nan)
    assert rig.optimiser.nonfinite == 0
    rig.step()
    assert rig.optimiser.nonfinite == 1
    rig.step(scale=math.nan)
    settle()  # as before a checkpoint
    assert rig.optimiser.nonfinite == 2


def test_warm_up_rises_linearly_and_cosine_decay_falls_to_zero():
    config = tiny_config(".")
    config.optimizer.learning_rate, config.optimizer.warmup_steps, config.train.max_steps = 0.1, 4, 100
    assert [learning_rate(config, step) for step in (0, 1, 2, 3, 99)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    config.optimizer.warmup_steps, config.optimizer.decay = 0, "cosine"
    assert learning_rate(config, 0) == pytest.approx(0.1) and learning_rate(config, 50) == pytest.approx(0.05)
    assert learning_rate(config, 99) < 1e-4
    rig = Rig(optimizer__learning_rate=0.1, optimizer__warmup_steps=4)
    rig.step()
    assert rig.optimiser.adamw.param_groups[0]["lr"] == pytest.approx(0.025)


def test_the_average_starts_from_the_weights_and_follows_the_closed_form():
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.9, every=10)
    start = model.weight.detach().clone()
    assert torch.equal(ema.modules.weight, start)
    with torch.no_grad():
        model.weight.add_(1.0)
    for step in range(1, 10):
        ema.update(step)
    assert torch.equal(ema.modules.weight, start)
    for step in range(10, 60):
        ema.update(step)
    torch.testing.assert_close(ema.modules.weight, start + (1 - 0.9**5))


def test_the_average_is_in_eval_mode_without_gradients_and_copies_buffers():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    ema = EMA(model, decay=0.5, every=1)
    model(torch.randn(8, 3) + 5)
    ema.update(1)
    assert not any(module.training for module in ema.modules.modules())
    assert not any(parameter.requires_grad for parameter in ema.modules.parameters())
    assert torch.equal(ema.modules[0].running_mean, model[0].running_mean)
