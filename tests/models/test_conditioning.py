import math

import pytest
import torch
import torch.nn.functional as F

from models.conditioning import FiLM, TimeEmbedding, sinusoidal_features


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 3, 5, 4), (2, 4)])
@pytest.mark.parametrize("with_t", [True, False])
@pytest.mark.parametrize("with_z", [True, False])
def test_film_is_its_equation(shape, with_t, with_z):
    torch.manual_seed(0)
    film = FiLM(4, time_dim=6 if with_t else None, z_dim=3 if with_z else None)
    h, t, z = torch.randn(shape), torch.randn(2, 6), torch.randn(2, 3)
    out = film(h, t if with_t else None, z if with_z else None)
    for image in range(2):
        expected = h[image]
        if with_t:
            scale, shift = film.time(F.gelu(t[image])).chunk(2)
            expected = expected * (1 + scale) + shift
        if with_z:
            first, _, last = film.latent
            expected = expected * (1 + last(F.gelu(first(z[image]))))
        torch.testing.assert_close(out[image], expected)


def test_film_without_either_is_the_identity_and_has_no_parameters():
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
