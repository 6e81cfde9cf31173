"""Encoding a part of the pixels, and decoding along another path."""

import torch

from diffusion.gaussian_diffusion import build_diffusion
from diffusion.generate import decode, encode
from diffusion.samplers import sample
from tests.models.tiny import SIZE, tiny_config, tiny_decoder, tiny_encoder
from utils.rng import randn, sample_generators


def draw(*shape, seed=0):
    return randn(shape, sample_generators("cpu", range(shape[0]), seed))


def test_the_encoder_sees_known_pixels_alone():
    """In each image as many as it has."""
    encoder, images, known = tiny_encoder(), draw(3, 3, SIZE, SIZE), draw(3, 1, SIZE, SIZE, seed=1) > -0.5
    known[0, :, :5] = False
    assert len(set(known.flatten(1).sum(1).tolist())) == 3
    z = encode(encoder, images, known)
    other = torch.where(known, images, draw(3, 3, SIZE, SIZE, seed=2))
    assert z.shape == (3, 6) and torch.equal(z, encode(encoder, other, known))
    assert not torch.allclose(z, encode(encoder, images))
    torch.testing.assert_close(encode(encoder, images, torch.ones_like(known)), encode(encoder, images))


def test_a_path_takes_the_place_of_the_sampler():
    diffusion, decoder, z = build_diffusion(tiny_config(), steps=4), tiny_decoder(), draw(2, 6)
    generators, steps = sample_generators("cpu", range(2), "image"), []
    expected = decode(decoder, diffusion, z, (9, 12), "ddim", sample_generators("cpu", range(2), "image"))

    def path(denoise, x):
        assert x.shape == (2, 3, 9, 12) and not torch.is_grad_enabled()
        return sample("ddim", denoise, x, diffusion)

    assert torch.equal(decode(decoder, diffusion, z, (9, 12), None, generators, progress=steps.append, path=path),
                       expected)
    assert steps == [1] * 4
