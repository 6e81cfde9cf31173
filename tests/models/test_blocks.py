"""The sparse block with its kernel at every resolution, the conditioning on t and z, and the features of t."""

import math

import pytest
import torch
import torch.nn.functional as F

from data.coordinates import Coordinates
from experiments.lib.reference import film_vectors
from models.blocks import Conditioning, FiLM, SparseBlock, resize_kernel, sinusoidal_features
from models.sparse_conv import sparse_conv
from tests.models.tiny import awake


@pytest.mark.parametrize(("train", "length", "taps"), [
    (64, 64, 7), (64, 128, 13), (64, 32, 3), (64, 256, 27), (64, 16, 3), (64, 8, 3), (64, 96, 11), (64, 127, 13),
    (64, 48, 5), (40, 40, 7), (256, 1024, 27), (64, 192, 21), (64, 320, 35), (64, 130, 15),
])
def test_a_kernel_takes_the_nearest_odd_size_and_of_two_the_smaller(train, length, taps):
    kernel = torch.rand(7, 7, 2)
    assert resize_kernel(kernel, (length, train), train).shape == (taps, 7, 2)
    assert resize_kernel(kernel, (train, length), train).shape == (7, taps, 2)


def test_a_kernel_keeps_its_values_and_a_single_tap_stays_one_at_the_training_resolution():
    kernel = torch.rand(5, 5, 2)
    assert resize_kernel(kernel, (24, 24), 24) is kernel
    assert resize_kernel(torch.rand(1, 1, 2), (16, 16), 16).shape == (1, 1, 2)


@pytest.mark.parametrize("size", [(32, 32), (16, 32), (8, 8), (40, 24), (128, 64)])
@pytest.mark.parametrize("shape", [(5, 5, 3), (5, 5, 3, 2)])
def test_a_constant_kernel_keeps_its_integral(size, shape):
    coords = Coordinates.random(1, size, size[0] * size[1] // 2, generator=torch.Generator().manual_seed(0))
    out = sparse_conv(torch.ones(1, coords.num_points, 3), resize_kernel(torch.full(shape, 2.0), size, 16), coords)
    torch.testing.assert_close(out, torch.full_like(out, 25 * 2.0 * (1 if len(shape) == 3 else 3)), rtol=1e-4, atol=0)


def test_no_tap_is_skipped_and_axes_are_resized_separately():
    for size in [(8, 8), (16, 24), (40, 64)]:
        kernel = torch.rand(7, 7, 1, requires_grad=True)
        resize_kernel(kernel, size, 32).sum().backward()
        assert (kernel.grad > 0.1).all()  # 1 each, apart from the border
    rows = torch.arange(7.0)[:, None, None].expand(7, 7, 1)
    kernel = resize_kernel(rows, (64, 32), 32)[..., 0] * (13 * 7 / 49)
    assert kernel.shape == (13, 7)
    assert (kernel == kernel[:, :1]).all() and (kernel[1:, 0] >= kernel[:-1, 0]).all()
    torch.testing.assert_close(kernel.mean(), rows.mean())


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (64, 64), (32, 64), (128, 128)])
def test_the_operator_is_the_same_integral_at_every_resolution(size):
    """A smooth kernel applied to a smooth function, away from the border."""

    def apply(size):
        coords = Coordinates.full(1, size)
        x, y = coords.positions.unbind(-1)
        features = (torch.sin(5 * x) + torch.cos(4 * y + 1))[..., None]
        u, v = torch.meshgrid(torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 7), indexing="ij")
        kernel = (1 - u**2) * (1 - v**2) + 0.2 * u - 0.1 * v
        return coords.scatter(sparse_conv(features, resize_kernel(kernel[..., None], size, 32), coords))

    expected, actual = (F.interpolate(apply(one), (16, 16), mode="area")[..., 3:-3, 3:-3] for one in ((32, 32), size))
    tolerance = 0.2 if min(size) == 16 else 0.1  # three taps are left at half the resolution
    assert (actual - expected).square().mean().sqrt() < tolerance * expected.std()


def block_and_inputs(**options):
    torch.manual_seed(0)
    block, generator = SparseBlock(8, 3, train_size=16, **options), torch.Generator().manual_seed(0)
    block.film_conv.index, block.film_mlp.index = 0, 1
    coords = Coordinates.random(2, (16, 16), 64, generator=generator)
    x, *vectors = (torch.randn(shape, generator=generator) for shape in [(2, 64, 8), (2, 8), (2, 8), (2, 8), (2, 8)])
    return block, x, [vectors[:2], vectors[2:]], coords


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (32, 8)])
def test_the_block_is_its_equations_at_every_resolution(depthwise, size):
    block, x, modulation, coords = block_and_inputs(depthwise=depthwise)
    block, coords = awake(block), Coordinates(coords.index, size)
    h = block.film_conv(block.norm_conv(x), modulation)
    expected = x + sparse_conv(h, resize_kernel(block.kernel, size, 16), coords)
    expected = expected + block.mlp(block.film_mlp(block.norm_mlp(expected), modulation))
    torch.testing.assert_close(block(x, coords, modulation), expected)


@pytest.mark.parametrize("depthwise", [True, False])
def test_initial_values_of_the_block(depthwise):
    block, x, modulation, coords = block_and_inputs(depthwise=depthwise)
    bound = (8 * 9) ** -0.5
    assert 0.9 * bound < block.kernel.abs().max() <= bound and abs(block.kernel.mean()) < 0.2 * bound
    k_only = x + sparse_conv(block.film_conv(block.norm_conv(x), modulation), block.kernel, coords)
    torch.testing.assert_close(block(x, coords, modulation), k_only)  # the MLP starts at zero


def layers_and_conditioning(widths, time_dim=6, z_dim=3):
    torch.manual_seed(0)
    layers = [FiLM(width) for width in widths]
    return layers, Conditioning(layers, time_dim, z_dim)


@pytest.mark.parametrize("inner", [(7,), (3, 5), ()])
def test_film_is_its_equation_in_layers_of_any_widths_and_order(inner):
    layers, conditioning = layers_and_conditioning([8, 4, 8, 16, 4])
    t, z = torch.randn(2, 6), torch.randn(2, 3)
    vectors = film_vectors(conditioning, t, z)
    for layer in layers:
        h = torch.randn(2, *inner, layer.width)
        scale_t, shift_t, scale_z = vectors[layer.index]
        for image, out in enumerate(layer(h, conditioning(t, z))):
            expected = (h[image] * (1 + scale_t[image]) + shift_t[image]) * (1 + scale_z[image])
            torch.testing.assert_close(out, expected)


def test_without_z_only_t_modulates():
    layers, conditioning = layers_and_conditioning([4, 8], z_dim=0)
    t = torch.randn(2, 6)
    for width, (scale, shift) in zip([4, 8], conditioning(t, torch.zeros(2, 0)), strict=True):
        assert scale.shape == shift.shape == (2, width)
    assert sum(parameter.numel() for parameter in conditioning.parameters()) == 2 * 12 * (6 + 1)


def test_every_layer_has_linears_of_its_own_as_many_parameters_and_as_much_variance():
    widths, time_dim, z_dim = [64, 256, 64], 32, 16
    layers, conditioning = layers_and_conditioning(widths, time_dim, z_dim)
    expected = sum(2 * w * (time_dim + 1) + w * (z_dim + 1) + w * (w + 1) for w in widths)
    assert sum(parameter.numel() for parameter in conditioning.parameters()) == expected
    for weight, bias in zip(conditioning.latent_weights, conditioning.latent_biases, strict=True):
        assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1) and not bias.any()
    modulation = conditioning(torch.randn(2, time_dim), torch.randn(2, z_dim))
    rows = torch.stack([torch.cat(modulation[layer.index], dim=1)[:, :64] for layer in layers]).flatten(0, 1)
    assert (torch.cdist(rows, rows) + torch.eye(6) > 1e-2).all()  # no two layers and no two samples share a row


def test_scales_close_to_one_survive_bfloat16():
    layers, conditioning = layers_and_conditioning([4, 4])
    with torch.no_grad():
        for name, parameter in conditioning.named_parameters():
            parameter.fill_({"time.bias": 0.003, "latent_biases.0": 0.002}.get(name, 0.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        modulation = conditioning(torch.randn(2, 6), torch.randn(2, 3))
    for scale, shift in modulation:
        torch.testing.assert_close(scale, torch.full((2, 4), 1.003 * 1.002), rtol=0, atol=2e-5)
        torch.testing.assert_close(shift, torch.full((2, 4), 0.003 * 1.002), rtol=0, atol=2e-5)
    h = torch.full((1, 2, 4), 1024.0, dtype=torch.bfloat16)
    out = layers[0](h, [(torch.full((1, 4), 1.003), torch.full((1, 4), 2.0))] * 2)
    assert torch.equal(out, torch.full_like(h, 1032))  # nearest to 1029.07; with 1.003 rounded to 1 it would be 1024


def test_film_without_modulation_is_the_identity_and_has_no_parameters():
    film, h = FiLM(4), torch.randn(2, 3, 4)
    assert film(h) is h and not list(film.parameters())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_features_of_t_are_sines_then_cosines_of_frequencies_from_1_to_1e_minus_4(dtype):
    with torch.autocast("cpu", torch.bfloat16):
        features = sinusoidal_features(torch.tensor([0, 1, 999]).to(dtype), 8)
    assert features.dtype == torch.float32
    for row, step in zip(features.tolist(), [0, 1, 999], strict=True):
        angles = [step * 10_000 ** (-i / 3) for i in range(4)]
        assert row == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], abs=1e-3)


def test_fractions_of_a_step_have_their_own_features():
    whole, half = sinusoidal_features(torch.tensor([10.0, 10.5]), 8)
    assert (whole - half).abs().max() > 1e-2
