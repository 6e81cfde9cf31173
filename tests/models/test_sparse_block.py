import pytest
import torch
import torch.nn.functional as F

from data.coordinates import Coordinates
from models.sparse_block import SparseBlock, resize_kernel
from models.sparse_conv import sparse_conv
from tests.models.tiny import awake


@pytest.mark.parametrize(("train", "length", "taps"), [
    (64, 64, 7), (64, 128, 15), (64, 32, 3), (64, 256, 29), (64, 16, 3), (64, 8, 3), (64, 96, 11), (64, 127, 13),
    (64, 48, 5), (40, 40, 7), (256, 1024, 29),
])
def test_a_kernel_takes_the_nearest_odd_size_and_of_two_the_longer(train, length, taps):
    kernel = torch.rand(7, 7, 2)
    assert resize_kernel(kernel, (length, train), train).shape == (taps, 7, 2)
    assert resize_kernel(kernel, (train, length), train).shape == (7, taps, 2)
    assert abs(taps - 7 * length / train) <= 1 or taps == 3


def test_a_single_tap_stays_one_at_its_resolution():
    assert resize_kernel(torch.rand(1, 1, 2), (16, 16), 16).shape == (1, 1, 2)


def test_at_the_training_resolution_the_kernel_is_untouched():
    kernel = torch.rand(5, 5, 2)
    assert resize_kernel(kernel, (24, 24), 24) is kernel


@pytest.mark.parametrize("size", [(32, 32), (16, 32), (8, 8), (40, 24), (128, 64)])
@pytest.mark.parametrize("shape", [(5, 5, 3), (5, 5, 3, 2)])
def test_a_constant_kernel_keeps_its_integral(size, shape):
    coords = Coordinates.random(2, size, size[0] * size[1] // 2, generator=torch.Generator().manual_seed(0))
    kernel = resize_kernel(torch.full(shape, 2.0), size, 16)
    out = sparse_conv(torch.ones(2, coords.num_points, 3), kernel, coords)
    expected = 25 * 2.0 * (1 if len(shape) == 3 else 3)
    torch.testing.assert_close(out, torch.full_like(out, expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (40, 64)])
def test_no_tap_is_skipped(size):
    kernel = torch.rand(7, 7, 1, requires_grad=True)
    resize_kernel(kernel, size, 32).sum().backward()
    assert (kernel.grad > 0.1).all()  # 1 each if the border did not count a little more or less


def test_axes_are_resized_separately_and_orientation_is_kept():
    rows = torch.arange(7.0)[:, None, None].expand(7, 7, 1)
    kernel = resize_kernel(rows, (64, 32), 32)[..., 0] * (15 * 7 / 49)
    assert kernel.shape == (15, 7)
    assert (kernel == kernel[:, :1]).all() and (kernel[1:, 0] >= kernel[:-1, 0]).all()
    torch.testing.assert_close(kernel.mean(), rows.mean())


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (64, 64), (32, 64), (128, 128)])
def test_the_operator_is_the_same_integral_at_every_resolution(size):
    """A smooth kernel applied to a smooth function, away from the border, at twice the resolution and others."""

    def apply(size):
        coords = Coordinates.full(1, size)
        x, y = coords.positions.unbind(-1)
        features = (torch.sin(5 * x) + torch.cos(4 * y + 1))[..., None]
        u, v = torch.meshgrid(torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 7), indexing="ij")
        kernel = (1 - u**2) * (1 - v**2) + 0.2 * u - 0.1 * v
        return coords.scatter(sparse_conv(features, resize_kernel(kernel[..., None], size, 32), coords))

    expected = F.interpolate(apply((32, 32)), (16, 16), mode="area")[..., 3:-3, 3:-3]
    actual = F.interpolate(apply(size), (16, 16), mode="area")[..., 3:-3, 3:-3]
    tolerance = 0.2 if min(size) == 16 else 0.1  # three taps are all that is left at half the resolution
    assert (actual - expected).square().mean().sqrt() < tolerance * expected.std()


def block(**options):
    torch.manual_seed(0)
    layer = SparseBlock(8, 3, train_size=16, **options)
    layer.film_conv.place, layer.film_mlp.place = 0, 1
    return layer


def draw():
    generator = torch.Generator().manual_seed(0)
    coords = Coordinates.random(2, (16, 16), 64, generator=generator)
    x, *vectors = (torch.randn(shape, generator=generator) for shape in [(2, 64, 8), (2, 8), (2, 8), (2, 8), (2, 8)])
    return x, [vectors[:2], vectors[2:]], coords


@pytest.mark.parametrize("depthwise", [True, False])
def test_the_block_is_its_equations(depthwise):
    x, modulation, coords = draw()
    layer = awake(block(depthwise=depthwise))
    expected = x + sparse_conv(layer.film_conv(layer.norm_conv(x), modulation), layer.kernel, coords)
    expected = expected + layer.mlp(layer.film_mlp(layer.norm_mlp(expected), modulation))
    torch.testing.assert_close(layer(x, coords, modulation), expected)


@pytest.mark.parametrize("depthwise", [True, False])
def test_initial_values(depthwise):
    x, modulation, coords = draw()
    layer = block(depthwise=depthwise)
    bound = (8 * 9) ** -0.5
    assert 0.9 * bound < layer.kernel.abs().max() <= bound
    assert abs(layer.kernel.mean()) < 0.2 * bound
    k_only = x + sparse_conv(layer.film_conv(layer.norm_conv(x), modulation), layer.kernel, coords)
    torch.testing.assert_close(layer(x, coords, modulation), k_only)  # the MLP starts at zero


def test_the_block_resizes_its_kernel_to_the_image():
    layer = awake(block())
    x, modulation, coords = draw()
    finer = Coordinates(coords.index, (32, 8))
    kernel = resize_kernel(layer.kernel, (32, 8), 16)
    expected = x + sparse_conv(layer.film_conv(layer.norm_conv(x), modulation), kernel, finer)
    expected = expected + layer.mlp(layer.film_mlp(layer.norm_mlp(expected), modulation))
    torch.testing.assert_close(layer(x, finer, modulation), expected)
