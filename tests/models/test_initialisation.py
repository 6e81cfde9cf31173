import pytest
import torch
from torch import nn

from data.coordinates import Coordinates
from models.build import build_decoder, build_encoder
from models.initialisation import preserve_variance
from tests.models.tiny import tiny_config


@pytest.mark.parametrize(("layer", "shape", "channels"), [
    (nn.Linear(96, 200), (64, 96), -1),
    (nn.Conv2d(24, 64, 3, padding=1, padding_mode="circular"), (8, 24, 16, 16), 1),
    (nn.Conv2d(24, 64, 3, stride=2), (8, 24, 33, 33), 1),
    (nn.ConvTranspose2d(48, 24, 4, stride=2, padding=1), (8, 48, 32, 32), 1),
])
def test_a_layer_keeps_the_variance_of_independent_inputs(layer, shape, channels):
    torch.manual_seed(0)
    preserve_variance(layer)
    out = layer(torch.randn(shape))
    assert out.square().mean().item() == pytest.approx(1, rel=0.1)
    assert not layer.bias.any()


def test_layers_of_zeros_and_other_parameters_stay_as_they_are():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv2d(8, 8, 3))
    nn.init.zeros_(network[0].weight)
    nn.init.ones_(network[0].bias)
    preserve_variance(network)
    assert not network[0].weight.any() and network[0].bias.eq(1).all()
    assert network[1].weight.eq(1).all()


def test_an_untrained_encoder_tells_images_apart_and_the_decoder_hears_of_it():
    torch.manual_seed(0)
    encoder, decoder = build_encoder(tiny_config()).eval(), build_decoder(tiny_config()).eval()
    colours = torch.rand(32, 1, 3) * 2 - 1
    coords = Coordinates.full(32, (16, 16))
    z = encoder(colours.expand(-1, 256, -1), coords)
    assert z.std(0).mean() > 0.1
    modulation = decoder.conditioning(decoder.time(torch.full((32,), 500)), z)
    scales = torch.cat([scale for scale, _ in modulation], dim=1)
    assert scales.std(0).mean() > 0.03
