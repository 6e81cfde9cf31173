import pytest
import torch
import torch.nn.functional as F

from models import layers
from models.layers import Conv, ConvTranspose

# batch, height, width, channels in and out: the first ones have fewer nodes than a kernel has inputs
SMALL = [(2, 8, 8, 64, 32), (3, 5, 4, 40, 24), (1, 1, 1, 3, 5), (2, 3, 7, 16, 16)]
LARGE = [(2, 16, 16, 8, 8), (2, 9, 13, 3, 4)]


def outcome(layer, x, grad, dtype):
    """(result, gradients of x, weight and bias) of the layer in the given precision, as in a training step."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = layer(x)
    return out, *torch.autograd.grad(out, [x, layer.weight, layer.bias], grad.to(out.dtype))


@pytest.mark.parametrize(("batch", "height", "width", "channels", "out"), SMALL + LARGE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_convolution_forward_and_backward(batch, height, width, channels, out, dtype, tolerance, x_dtype):
    if dtype == torch.float32 and x_dtype != dtype:
        pytest.skip("a float32 layer takes float32")
    torch.manual_seed(0)
    layer = Conv(channels, out, 3, padding=1)
    x, grad = torch.randn(batch, height, width, channels).to(x_dtype), torch.randn(batch, height, width, out)
    x64, weight, bias = (t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    wanted = F.conv2d(x64.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
    wanted = wanted, *torch.autograd.grad(wanted, [x64, weight, bias], grad.double())
    found = outcome(layer, x, grad, dtype)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
    assert found[1].dtype == x_dtype
    assert found[2].dtype == found[3].dtype == torch.float32
    assert found[2].stride() == layer.weight.stride()  # else each step would copy it once more


@pytest.mark.parametrize("shape", SMALL + LARGE)
def test_the_fast_gradient_is_used_where_it_is_meant(shape, monkeypatch):
    batch, height, width, channels, out = shape
    layer, x = Conv(channels, out, 3, padding=1), torch.randn(batch, height, width, channels)
    grad = torch.randn(batch, height, width, out)
    taken = []
    windows = layers._windows
    monkeypatch.setattr(layers, "_windows", lambda x: taken.append(x) or windows(x))
    outcome(layer, x, grad, torch.float32)
    assert not taken
    outcome(layer, x, grad, torch.bfloat16)
    assert len(taken) == (1 if shape in SMALL else 0)


def test_second_derivatives_are_refused_where_the_gradient_is_written_by_hand():
    layer, x = Conv(64, 32, 3, padding=1), torch.randn(2, 8, 8, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x).sum() + x.pow(3).sum()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_strides_and_other_kernels_are_those_of_pytorch():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 64)
    layers = [Conv(64, 8, 3, stride=2, padding=1), Conv(64, 8, 1), Conv(64, 8, 5, padding=2), Conv(64, 8, 3),
              Conv(64, 8, 3, padding=1, dilation=2), Conv(64, 8, 3, padding=1, bias=False)]
    for layer in layers:
        with torch.autocast("cpu", torch.bfloat16):
            wanted = F.conv2d(
                x.permute(0, 3, 1, 2), layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
            assert torch.equal(layer(x), wanted.permute(0, 2, 3, 1))
    layer = ConvTranspose(64, 8, 4, stride=2, padding=1)
    wanted = F.conv_transpose2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, stride=2, padding=1)
    assert torch.equal(layer(x), wanted.permute(0, 2, 3, 1))


def test_the_backward_pass_is_that_of_the_forward_precision():
    """Whatever autocast is on when it runs."""
    batch, height, width, channels, out = SMALL[0]
    layer, x = Conv(channels, out, 3, padding=1), torch.randn(batch, height, width, channels, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x).float()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            gradients.append(torch.autograd.grad(result.sin().sum(), [x, layer.weight, layer.bias], retain_graph=True))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
