"""Fused AdamW on weights of any layout, against PyTorch's plain one."""

import copy

import pytest
import torch
from torch import nn

from models.layers import Conv, ConvTranspose
from utils.adamw import AdamW

OPTIONS = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def layers():
    """Weights [O, I, kh, kw] in both layouts, those of a Linear, a scalar, and one that is a view of another order."""
    torch.manual_seed(0)
    turned = nn.Parameter(torch.randn(5, 3, 4).permute(2, 0, 1))
    scalar = nn.Parameter(torch.randn(()))
    modules = [nn.Conv2d(4, 4, 3), Conv(4, 6, 3), ConvTranspose(6, 2, 4), nn.Linear(3, 1)]
    return [turned, scalar, *nn.ModuleList(modules).parameters()]


def step(optimizer, weights, number, layout=None):
    """A step with random gradients, in the layout of the weights or, those of convolutions, in the one given."""
    generator = torch.Generator().manual_seed(number)
    for weight in weights:
        gradient = torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=generator))
        weight.grad = gradient.contiguous(memory_format=layout) if layout and weight.dim() == 4 else gradient
    if isinstance(optimizer, AdamW):
        optimizer.take_gradients()
        assert all(weight.grad is None for weight in weights)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_updates_are_those_of_the_plain_loop(layout):
    ours, theirs = layers(), layers()
    fused, plain = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    strides = [weight.stride() for weight in ours]
    for number in range(4):
        step(fused, ours, number, layout)
        step(plain, theirs, number)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert [weight.stride() for weight in ours] == strides


def test_a_gradient_that_is_one_number_expanded_counts_as_often():
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, 33)), nn.Parameter(torch.ones(3, 5))] for _ in range(2))
    fused, plain = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    for number in (1.0, -3.0):
        for weight in (*ours, *theirs):
            weight.grad = torch.tensor(number).expand(weight.shape)
        fused.take_gradients()
        fused.step()
        plain.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_same_layout_are_not_copied():
    weights = layers()
    optimizer = AdamW(weights, **OPTIONS)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    places = [weight.grad.data_ptr() for weight in weights]
    views = optimizer.take_gradients()
    assert [view.grad.data_ptr() for view in views] == places
    assert all(tensor.is_contiguous() for view in views for tensor in (view, view.grad))


def test_a_weight_without_a_gradient_stays_as_it_is():
    weights = layers()
    optimizer = AdamW(weights, **OPTIONS)
    before = [weight.detach().clone() for weight in weights]
    weights[3].grad = torch.ones_like(weights[3])
    optimizer.take_gradients()
    optimizer.step()
    weights[2].grad = torch.ones_like(weights[2])  # and the gradient of the step before is forgotten
    assert [view.grad is not None for view in optimizer.take_gradients()] == [n == 2 for n in range(len(weights))]
    changed = [not torch.equal(weight, kept) for weight, kept in zip(weights, before, strict=True)]
    assert changed == [place == 3 for place in range(len(weights))]


def test_moments_come_back_and_go_on():
    ours, theirs = layers(), layers()
    one = AdamW(ours, **OPTIONS)
    step(one, ours, 0)
    other = AdamW(theirs, **OPTIONS)
    step(other, theirs, 0)
    again = AdamW(theirs, **OPTIONS)
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    step(one, ours, 1)
    step(again, theirs, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_state_of_pytorchs_optimizer_goes_on():
    ours, theirs = layers(), layers()
    before = torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    step(before, theirs, 0)
    for one, other in zip(ours, theirs, strict=True):
        one.data.copy_(other.data)
    optimizer = AdamW(ours, **OPTIONS)
    optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
    step(optimizer, ours, 1)
    step(before, theirs, 1)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_misuse_is_an_error_and_not_a_wrong_update():
    convolution = nn.Conv2d(4, 6, 3)
    other = AdamW(convolution.parameters(), **OPTIONS)
    step(other, list(convolution.parameters()), 0)
    with pytest.raises(ValueError, match="laid out otherwise"):
        AdamW(Conv(4, 6, 3).parameters(), **OPTIONS).load_state_dict(other.state_dict())
    convolution.weight.grad = torch.ones_like(convolution.weight)
    with pytest.raises(RuntimeError, match="take_gradients"):
        other.step()
    convolution.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="elsewhere"):
        other.take_gradients()
    with pytest.raises(ValueError, match="gaps"):
        AdamW([nn.Parameter(torch.randn(5, 6)[:, :3])])
