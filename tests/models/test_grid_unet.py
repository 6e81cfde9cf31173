"""The grid U-Net with its attention and its Fourier layers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import grid_unet
from models.grid_unet import Attention, GridDown, GridSpec, GridUNet, ResidualBlock, SpectralConv
from tests.models.tiny import awake
from utils.errors import UserError

SPEC = GridSpec(
    resolution=8, base_channels=8, mults=(1, 2, 2), blocks_per_level=(1, 2, 1), attn_resolutions=(4,),
    dropout_from_resolution=4, dropout=0.5,
)


def unet(spec=SPEC):
    torch.manual_seed(0)
    return awake(GridUNet(spec))


def image(seed=0, batch=2, width=8, resolution=8):
    return torch.randn(batch, width, resolution, resolution, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("conv_type", ["conv", "spectral"])
@pytest.mark.parametrize("resolution", [4, 8, 12])
def test_shapes_on_the_way_down_and_up(conv_type, resolution):
    spec = replace(SPEC, conv_type=conv_type, resolution=resolution, attn_resolutions=(resolution // 2,))
    net, grid = unet(spec), image(resolution=resolution)
    low, skips = net.down(grid)
    assert [skip.shape[1::2] for skip in skips] == [
        (resolution, 8), (resolution // 2, 8), (resolution // 2, 8), (resolution // 4, 16)]
    assert low.shape == (2, resolution // 4, resolution // 4, 16)
    out = net(grid)
    assert out.shape == grid.shape and out.is_contiguous(memory_format=torch.channels_last)


def test_every_stage_going_up_takes_the_output_of_its_counterpart():
    net, grid, inputs = unet(), image(), []
    for stage in [stage for stages in net.stages for stage in stages]:
        stage.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    net(grid)
    _, skips = net.down(grid)
    assert len(inputs) == len(skips) == 4
    for taken, skip in zip(inputs, reversed(skips), strict=True):
        assert torch.equal(taken[..., -skip.shape[-1] :], skip)


def test_every_parameter_matters_and_memory_stays_channels_last():
    net, formats = unet(), []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(lambda m, i, out: formats.append(out.is_contiguous()))
    net(image().to(memory_format=torch.channels_last)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in net.parameters())
    assert len(formats) > 10 and all(formats)  # [B, G, G, C] without a copy


@pytest.mark.parametrize(("cls", "per_block"), [(GridDown, 1), (GridUNet, 2)])
def test_attention_stands_where_it_is_asked_for_and_in_the_middle(cls, per_block):
    for resolutions, blocks in [((), 0), ((4,), 2), ((8, 2), 2)]:
        net = cls(replace(SPEC, attn_resolutions=resolutions))
        assert sum(isinstance(module, Attention) for module in net.modules()) == 1 + blocks * per_block


def test_dropout_acts_from_its_resolution_downwards_and_only_in_training():
    assert [ResidualBlock(SPEC, 8, 8, resolution).dropout.p for resolution in (8, 4, 2)] == [0.0, 0.5, 0.5]
    net, grid = unet(), image()
    assert torch.equal(net(grid), net(grid))
    net.train()
    assert not torch.equal(net(grid), net(grid))


@pytest.mark.parametrize("conv_type", ["conv", "spectral"])
@pytest.mark.parametrize("width_out", [8, 12])
def test_a_residual_block_starts_as_its_shortcut(conv_type, width_out):
    block, x = ResidualBlock(replace(SPEC, conv_type=conv_type), 8, width_out, 8), torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(x))
    assert torch.equal(block.shortcut(x), x) == (width_out == 8)


@pytest.mark.parametrize("resolution", [16, 7, 4, 2, 1])
def test_the_fourier_layer_multiplies_the_lowest_modes(resolution):
    torch.manual_seed(0)
    layer = SpectralConv(3, 2, resolution).double()
    x = torch.randn(2, resolution, resolution, 3, dtype=torch.float64)
    rows, columns = layer.weight.shape[:2]
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert (rows, columns) == (min(8, resolution), min(4, resolution // 2 + 1))
    spectrum = torch.fft.fft2(x, dim=(1, 2))
    low = torch.zeros(2, resolution, resolution // 2 + 1, 2, dtype=torch.complex128)
    for i, frequency in enumerate(range(-(rows // 2), rows - rows // 2)):
        for j in range(columns):
            low[:, frequency, j] = spectrum[:, frequency, j] @ torch.complex(*layer.weight[i, j].unbind(-1))
    expected = torch.fft.irfft2(low, s=(resolution, resolution), dim=(1, 2)) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.roll((1, 2), (1, 2))), layer(x).roll((1, 2), (1, 2)))  # as any convolution


def test_the_fourier_layer_keeps_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = SpectralConv(3, 2, 8), torch.randn(1, 8, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.float()(x))
    assert layer(x.bfloat16()).dtype == torch.float32


def attention(width=64, kind="auto"):
    torch.manual_seed(0)
    return awake(Attention(width, kind))


@pytest.mark.parametrize(("width", "heads"), [(16, 4), (128, 4), (160, 5), (256, 8)])
def test_attention_is_softmax_attention_with_biases_a_residual_and_heads_of_32(width, heads):
    layer, x = attention(width), torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(0))
    assert layer.heads == heads and layer.qkv.bias.shape == (3 * 32 * heads,)
    tokens = x.reshape(2, 15, width)
    qkv = F.linear(F.layer_norm(tokens, (width,), layer.norm.weight, layer.norm.bias), layer.qkv.weight, layer.qkv.bias)
    q, k, v = (part.reshape(2, 15, heads, 32).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    mixed = ((q @ k.mT) / 32**0.5).softmax(-1) @ v
    expected = tokens + layer.out(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected.reshape(x.shape))
    torch.testing.assert_close(layer(x.flip(1, 2)), layer(x).flip(1, 2))  # it knows no positions
    torch.testing.assert_close(Attention(width)(x), x)  # and starts as the identity


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_attention_in_every_precision_forward_and_backward(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    qkv = 2 * torch.randn(2, 15, 3, 4, 32, generator=generator, dtype=torch.float64)
    found = []
    for attend, x in ((grid_unet._sdpa, qkv.to(dtype)), (written_out, qkv.to(dtype).double())):
        x = x.detach().requires_grad_()
        out = attend(*x.unbind(2))
        found.append([out, *torch.autograd.grad(out, x, torch.ones_like(out))])
    for ours, exact in zip(*found, strict=True):
        assert ours.dtype == dtype and (ours.double() - exact).norm() <= tolerance * exact.norm()


def written_out(q, k, v):
    """Attention with the signature of flash_attn_func: [B, L, heads, 32] in and out."""
    weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhlm,bmhd->blhd", weights, v)


def test_the_flash_path_computes_the_same(monkeypatch):
    x = torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(0))
    expected = attention(kind="sdpa")(x)
    monkeypatch.setattr(grid_unet, "_flash_attn", lambda: written_out)
    assert torch.equal(attention()(x), expected)  # on a CPU, auto is sdpa
    with pytest.raises(UserError, match=r"model\.attention='flash_attn'.*cpu and float32"):
        attention(kind="flash_attn")(x)
    monkeypatch.setattr(Attention, "_uses_flash", lambda self, q: True)
    torch.testing.assert_close(attention()(x), expected)


def test_unknown_or_missing_kinds_of_attention_are_refused(monkeypatch):
    monkeypatch.setattr(grid_unet, "_flash_attn", lambda: None)
    for kind, message in [("xformers", "auto, sdpa, flash_attn"), ("flash_attn", "install")]:
        with pytest.raises(UserError, match=rf"model\.attention='{kind}'.*{message}"):
            Attention(64, kind)
