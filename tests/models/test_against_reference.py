"""The fast networks against experiments/lib/reference.py: the same numbers from the same parameters."""

import pytest
import torch

from experiments.lib.reference import ReferenceDecoder, ReferenceEncoder, nearest_points
from experiments.lib.reference import knn_to_grid as reference_knn_to_grid
from models.interpolation import knn_to_grid
from models.nearest import nearest_pixels
from tests.models.tiny import draw, tiny_decoder, tiny_encoder

CASES = [((16, 16), 1 / 4), ((16, 16), 1), ((16, 16), 1 / 8), ((32, 16), 1 / 2), ((17, 13), 1 / 4)]


def gradients(model, out):
    """Gradients of a fixed function of the outputs, in order of the parameters."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return torch.autograd.grad((out * weight).sum(), list(model.parameters()))


@pytest.mark.parametrize(("size", "share"), CASES)
@pytest.mark.parametrize("model", [{}, {"depthwise_sparse": False, "knn_neighbours": 2}])
def test_the_decoder_forward_and_backward(size, share, model):
    decoder = tiny_decoder(**model)
    values, t, z, coords = draw(size=size, share=share)
    values = values.float()
    expected, actual = ReferenceDecoder(decoder)(values, t, z, coords), decoder(values, t, z, coords)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(gradients(decoder, actual), gradients(decoder, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize(("size", "share"), CASES)
def test_the_encoder_forward_and_backward(size, share):
    encoder = tiny_encoder()
    values, _, _, coords = draw(size=size, share=share)
    expected, actual = ReferenceEncoder(encoder)(values, coords), encoder(values, coords)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(gradients(encoder, actual), gradients(encoder, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1.0, theirs.abs().max().item()))


def test_bfloat16_stays_near_float32():
    decoder = tiny_decoder()
    values, t, z, coords = draw()
    expected = ReferenceDecoder(decoder)(values, t, z, coords)
    with torch.autocast("cpu", torch.bfloat16):
        actual = decoder(values, t, z, coords)
    assert (actual - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


@pytest.mark.parametrize(("size", "share"), CASES[:4])
@pytest.mark.parametrize("grid_size", [8, 5])
def test_the_nearest_points_by_all_distances(size, share, grid_size):
    _, _, _, coords = draw(size=size, share=share)
    place, distance = nearest_points(coords, grid_size, 3)
    found, squared = nearest_pixels(coords, grid_size, 3)
    torch.testing.assert_close(squared.sqrt(), distance, rtol=1e-5, atol=1e-6)
    assert grid_size == 5 or torch.equal(found, place)  # in fifths, equal distances differ by rounding
    features = torch.randn(2, coords.num_points, 4)
    if grid_size == 8:
        torch.testing.assert_close(knn_to_grid(features, coords, 8, 3), reference_knn_to_grid(features, coords, 8, 3))
