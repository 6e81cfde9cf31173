"""Encoding a part of the pixels, and decoding along another path."""

import torch
import torch.nn.functional as F

from diffusion.gaussian_diffusion import build_diffusion
from diffusion.samplers import ddim, sample
from diffusion.sampling import decode, encode, images_at_once, invert
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


def test_every_resolution_shows_the_same_image():
    """At 2 and 4 times the training resolution and at another aspect, reduced to it again.

    Random weights do, as preconditioning makes the network but a part of the denoiser, as training would.
    """
    config = tiny_config(kernel_size=5)
    config.diffusion.precondition = True
    diffusion, decoder, z = build_diffusion(config, steps=5), tiny_decoder(kernel_size=5), draw(3, 6)
    images = {}
    for size in ((16, 16), (32, 32), (64, 64), (48, 32)):
        generators = sample_generators("cpu", range(3), "image")
        image = decode(decoder, diffusion, z, size, generators, eta=0.5)
        images[size] = F.interpolate(image, (16, 16), mode="area")
    expected = images.pop((16, 16))
    for size, image in images.items():
        same, other = ((image - of).square().mean().sqrt() for of in (expected, expected.roll(1, 0)))
        assert same < 0.18 * other, size


def test_a_path_takes_the_place_of_the_sampler():
    diffusion, decoder, z = build_diffusion(tiny_config(), steps=4), tiny_decoder(), draw(2, 6)
    generators, steps = sample_generators("cpu", range(2), "image"), []
    expected = decode(decoder, diffusion, z, (9, 12), sample_generators("cpu", range(2), "image"))

    def path(denoise, x):
        assert x.shape == (2, 3, 9, 12) and not torch.is_grad_enabled()
        return sample(denoise, x, diffusion)

    assert torch.equal(decode(decoder, diffusion, z, (9, 12), generators, progress=steps.append, path=path),
                       expected)
    assert steps == [1] * 4


def test_inversion_leads_back_to_the_image():
    """With the best denoiser of normal images, which is what a preconditioned network is that has learned nothing."""
    config = tiny_config()
    config.diffusion.precondition = True
    diffusion, z, steps = build_diffusion(config, steps=200), draw(2, 6), []

    def decoder(values, t, z, coords, max_points):
        return torch.zeros_like(values)

    images = 0.3 * diffusion.mollifier.blur(draw(2, 3, 9, 12, seed=5))
    x = invert(decoder, diffusion, images, z, steps.append)
    ends = [decode(decoder, diffusion, z, (9, 12), path=lambda denoise, noise, x=x: ddim(
        denoise, noise if x is None else x, diffusion.schedule)) for x in (x, None)]
    limit = diffusion.mollifier.sharpen(diffusion.mollifier.blur(images))
    near, far = ((end - limit).square().mean() for end in ends)
    assert steps == [1] * 200 and x.shape == images.shape and near < 0.01 * far


def test_no_more_images_at_a_time_than_fit_but_one_at_least():
    assert [images_at_once(16, (64, 32), limit) for limit in (None, 2**20, 5 * 2048, 2048, 100)] == [16, 16, 5, 1, 1]
