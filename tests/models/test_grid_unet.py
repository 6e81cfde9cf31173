from dataclasses import replace

import pytest
import torch
from torch import nn

from models.attention import Attention
from models.grid_unet import GridDown, GridSpec, GridUNet, ResidualBlock
from models.spectral import SpectralConv
from tests.models.tiny import awake

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
    assert [tuple(skip.shape[1:]) for skip in skips] == [
        (resolution, resolution, 8), (resolution // 2, resolution // 2, 8), (resolution // 2, resolution // 2, 8),
        (resolution // 4, resolution // 4, 16),
    ]
    assert low.shape == (2, resolution // 4, resolution // 4, 16)
    out = net(grid)
    assert out.shape == grid.shape
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_every_stage_going_up_takes_the_output_of_its_counterpart():
    net, grid, inputs = unet(), image(), []
    for stage in [stage for stages in net.stages for stage in stages]:
        stage.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    net(grid)
    _, skips = net.down(grid)
    assert len(inputs) == len(skips) == 4
    for taken, skip in zip(inputs, reversed(skips), strict=True):
        assert torch.equal(taken[..., -skip.shape[-1] :], skip)


def test_every_parameter_matters():
    net = unet()
    net(image()).square().sum().backward()
    silent = [name for name, parameter in net.named_parameters() if not parameter.grad.any()]
    assert not silent


def test_memory_stays_channels_last_through_the_network():
    net, formats = unet(), []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(lambda m, i, out: formats.append(out.is_contiguous()))
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    net(image().to(memory_format=torch.channels_last))
    assert len(formats) > 10 and all(formats)  # [B, G, G, C] without a copy


@pytest.mark.parametrize("cls", [GridDown, GridUNet])
def test_attention_stands_where_it_is_asked_for_and_in_the_middle(cls):
    def count(spec):
        return sum(isinstance(module, Attention) for module in cls(spec).modules())

    per_block = 1 if cls is GridDown else 2
    assert count(replace(SPEC, attn_resolutions=())) == 1
    assert count(replace(SPEC, attn_resolutions=(4,))) == 1 + 2 * per_block
    assert count(replace(SPEC, attn_resolutions=(8, 2))) == 1 + 2 * per_block


def test_dropout_acts_from_its_resolution_downwards_and_only_in_training():
    rates = {}
    for resolution in (8, 4, 2):
        rates[resolution] = ResidualBlock(SPEC, 8, 8, resolution).dropout.p
    assert rates == {8: 0.0, 4: 0.5, 2: 0.5}
    net, grid = unet(), image()
    assert torch.equal(net(grid), net(grid))
    net.train()
    torch.manual_seed(0)
    assert not torch.equal(net(grid), net(grid))
    assert torch.equal(unet(replace(SPEC, dropout=0.0)).train()(grid), unet(replace(SPEC, dropout=0.0))(grid))


@pytest.mark.parametrize("conv_type", ["conv", "spectral"])
@pytest.mark.parametrize("width_out", [8, 12])
def test_a_residual_block_starts_as_its_shortcut(conv_type, width_out):
    block, x = ResidualBlock(replace(SPEC, conv_type=conv_type), 8, width_out, 8), torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(x))
    assert torch.equal(block.shortcut(x), x) == (width_out == 8)


@pytest.mark.parametrize("resolution", [16, 8, 7, 4, 2, 1])
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
            matrix = torch.complex(layer.weight[i, j, :, :, 0], layer.weight[i, j, :, :, 1])
            low[:, frequency, j] = spectrum[:, frequency, j] @ matrix
    expected = torch.fft.irfft2(low, s=(resolution, resolution), dim=(1, 2)) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.roll((1, 2), (1, 2))), layer(x).roll((1, 2), (1, 2)))  # as any convolution


def test_the_fourier_layer_keeps_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = SpectralConv(3, 2, 8), torch.randn(1, 8, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.equal(out, layer(x))
    assert layer(x.bfloat16()).dtype == torch.float32


def test_spectral_and_plain_convolutions_differ():
    grid = image()
    assert not torch.allclose(unet()(grid), unet(replace(SPEC, conv_type="spectral"))(grid))
