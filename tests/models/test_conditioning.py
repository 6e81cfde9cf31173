import math

import pytest
import torch

from experiments.lib.reference import film_vectors
from models.conditioning import Conditioning, FiLM, TimeEmbedding, sinusoidal_features


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
        scale_t, shift_t, scale_z = vectors[layer.place]
        for image, out in enumerate(layer(h, conditioning(t, z))):
            expected = (h[image] * (1 + scale_t[image]) + shift_t[image]) * (1 + scale_z[image])
            torch.testing.assert_close(out, expected)


def test_every_layer_has_linears_of_its_own():
    """One row of numbers for each: no two layers, and no two samples, share what they get."""
    layers, conditioning = layers_and_conditioning([4, 4, 4])
    modulation = conditioning(torch.randn(2, 6), torch.randn(2, 3))
    rows = torch.stack([torch.cat(modulation[layer.place], dim=1) for layer in layers]).flatten(0, 1)
    assert (torch.cdist(rows, rows) + torch.eye(6) > 1e-2).all()


def test_parameters_are_as_many_as_those_of_separate_linears_and_keep_the_variance():
    widths, time_dim, z_dim = [64, 256, 64], 32, 16
    _, conditioning = layers_and_conditioning(widths, time_dim, z_dim)
    expected = sum(2 * w * (time_dim + 1) + w * (z_dim + 1) + w * (w + 1) for w in widths)
    assert sum(parameter.numel() for parameter in conditioning.parameters()) == expected
    for weight in conditioning.latent_weights:
        assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)
    for bias in conditioning.latent_biases:
        assert not bias.any()


def test_scales_close_to_one_survive_bfloat16():
    """Before training they are 1 plus some thousandths, which bfloat16 would round to 1."""
    _, conditioning = layers_and_conditioning([4, 4])
    torch.nn.init.zeros_(conditioning.time.weight)
    torch.nn.init.constant_(conditioning.time.bias, 0.003)
    for weight, bias in zip(conditioning.latent_weights, conditioning.latent_biases, strict=True):
        torch.nn.init.zeros_(weight)
        torch.nn.init.constant_(bias, 0.002)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        modulation = conditioning(torch.randn(2, 6), torch.randn(2, 3))
    for scale, shift in modulation:
        torch.testing.assert_close(scale, torch.full((2, 4), 1.003 * 1.002), rtol=0, atol=2e-5)
        torch.testing.assert_close(shift, torch.full((2, 4), 0.003 * 1.002), rtol=0, atol=2e-5)


def test_film_rounds_once():
    film, h = FiLM(4), torch.full((1, 2, 4), 1024.0, dtype=torch.bfloat16)
    film.place = 0
    out = film(h, [(torch.full((1, 4), 1.003), torch.full((1, 4), 2.0))])
    assert torch.equal(out, torch.full_like(h, 1032))  # nearest to 1029.07; with 1.003 rounded to 1 it would be 1024


def test_film_without_modulation_is_the_identity_and_has_no_parameters():
    film, h = FiLM(4), torch.randn(2, 3, 4)
    assert film(h) is h
    assert not list(film.parameters())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_sinusoidal_features(dtype):
    t = torch.tensor([0, 1, 999]).to(dtype)
    features = sinusoidal_features(t, 8)
    assert features.dtype == torch.float32
    for row, step in zip(features.tolist(), [0, 1, 999], strict=True):
        frequencies = [10_000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(step * f) for f in frequencies] + [math.sin(step * f) for f in frequencies]
        assert row == pytest.approx(expected, abs=1e-3)


def test_fractions_of_a_step_have_their_own_embedding():
    torch.manual_seed(0)
    embedding = TimeEmbedding(8, 5)
    out = embedding(torch.tensor([10.0, 10.5, 11.0]))
    assert out.shape == (3, 5)
    assert (out[0] - out[1]).abs().max() > 1e-4 and (out[1] - out[2]).abs().max() > 1e-4


def test_features_of_t_are_not_rounded_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        features = sinusoidal_features(torch.tensor([997]), 8)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, sinusoidal_features(torch.tensor([997]), 8))
