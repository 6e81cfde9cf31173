"""The moving average: started from the weights, the closed form, its interval, its mode."""

import torch
from torch import nn

from utils.optimiser import EMA


def test_starts_from_the_weights_and_follows_the_closed_form():
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.9, every=1)
    start = model.weight.detach().clone()
    assert torch.equal(ema.modules.weight, start)
    with torch.no_grad():
        model.weight.add_(1.0)
    for step in range(1, 6):
        ema.update(step)
    torch.testing.assert_close(ema.modules.weight, start + (1 - 0.9**5))


def test_updates_at_its_interval_only():
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.5, every=10)
    before = ema.modules.weight.clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    for step in range(1, 10):
        ema.update(step)
    assert torch.equal(ema.modules.weight, before)
    ema.update(10)
    torch.testing.assert_close(ema.modules.weight, before + 0.5)


def test_is_in_eval_mode_without_gradients_and_copies_buffers():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    ema = EMA(model, decay=0.5, every=1)
    model(torch.randn(8, 3) + 5)
    ema.update(1)
    assert not any(module.training for module in ema.modules.modules())
    assert not any(parameter.requires_grad for parameter in ema.modules.parameters())
    assert torch.equal(ema.modules[0].running_mean, model[0].running_mean)
