"""Encoding a part of the pixels, and decoding along another path."""

import pytest
import torch
import torch.nn.functional as F

from data.conditions import Conditions, none_like
from data.coordinates import Coordinates
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.samplers import ddim, sample
from diffusion.sampling import Guidance, decode, encode, guided, images_at_once, invert, sample_latents
from models.build import build_decoder, build_latent_model
from tests.models.tiny import SIZE, awake, tiny_config, tiny_decoder, tiny_encoder, tiny_latent_config
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


CLASSES, VECTORS = Conditions("class", 3, ["a", "b", "c"]), Conditions("vector", 2, [], [1.0, 0.0], [2.0, 1.0])
CASES = [(CLASSES, torch.tensor([0, 2])), (VECTORS, torch.tensor([[3.0, 1.0], [-1.0, 0.5]]))]
LABELS = CASES[0][1]


@pytest.mark.parametrize("conditions, condition", CASES, ids=["class", "vector"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_guidance_extrapolates_from_the_evaluation_without_the_condition(conditions, condition, learn_sigma):
    """And needs one batch for both; a learned variance is that with the condition."""
    decoder = tiny_decoder(conditions, learn_sigma=learn_sigma)
    coords = Coordinates.random(2, (SIZE, SIZE), 60)
    inputs = draw(2, 60, 3), torch.tensor([300.0, 300.0]), draw(2, 6), coords
    followed, free = decoder(*inputs, condition=condition), decoder(*inputs)
    torch.testing.assert_close(decoder(*inputs, condition=none_like(condition)), free)
    assert not torch.allclose(followed, free, atol=1e-2) and not torch.allclose(
        followed, decoder(*inputs, condition=condition.flip(0)), atol=1e-2)
    for scale in (0.0, 1.0, 2.5):
        calls = count_calls(decoder)
        result = guided(decoder, condition, Guidance(scale))(*inputs)
        assert len(calls) == 1 and calls[0] == (2 if scale == 1 else 4)
        torch.testing.assert_close(result[..., :3], free[..., :3] + scale * (followed - free)[..., :3])
        torch.testing.assert_close(result[..., 3:], followed[..., 3:])
    assert guided(decoder, None, Guidance(2.0)) is decoder
    assert isinstance(guided(tiny_decoder(), condition, Guidance(2.0)), type(decoder))


def count_calls(network):
    """Batch sizes of the calls of a network from now on."""
    calls = []
    network.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    return calls


@pytest.mark.parametrize("objective, sampler", [("ddpm", "ddim"), ("ddpm", "dpm_solver"), ("flow", "heun"),
                                                ("few_step", "jump")])
def test_guidance_acts_within_its_interval_with_every_sampler(objective, sampler):
    config = tiny_config()
    config.diffusion.objective = objective
    torch.manual_seed(0)
    decoder = awake(build_decoder(config, CLASSES))
    diffusion, z, calls = build_diffusion(config, 10, sampler), draw(2, 6), count_calls(decoder)
    times = []
    decoder.register_forward_pre_hook(lambda _, inputs: times.append(inputs[1].flatten()[0].item()))

    def images(guidance, condition=LABELS):
        calls.clear(), times.clear()
        return decode(decoder, diffusion, z, (SIZE, SIZE), sample_generators("cpu", range(2), 0), condition=condition,
                      guidance=guidance)

    plain = images(Guidance())
    assert calls == [2] * 10
    whole = images(Guidance(3.0))
    assert calls == [4] * 10 and not torch.allclose(whole, plain, atol=0.05)
    part = images(Guidance(3.0, (0.3, 0.6)))
    assert calls == [4 if 0.3 <= 1 - time / 1000 <= 0.6 else 2 for time in times] and set(calls) == {2, 4}
    assert (part - plain).abs().mean() < (whole - plain).abs().mean()
    torch.testing.assert_close(images(Guidance(0.0)), images(Guidance(), None), atol=1e-4, rtol=0)


def test_conditions_of_a_batch_that_is_divided():
    """Images are made one at a time for --max_points, each with its own condition."""
    decoder, diffusion, z = tiny_decoder(CLASSES), build_diffusion(tiny_config(), 3), draw(2, 6)
    at_once, alone = (decode(decoder, diffusion, z, (SIZE, SIZE), sample_generators("cpu", range(2), 0),
                             max_points=most, condition=LABELS, guidance=Guidance(2.0))
                      for most in (None, 2 * SIZE**2))
    torch.testing.assert_close(alone, at_once, atol=1e-4, rtol=0)
    parts = decode(decoder, diffusion, z, (SIZE, SIZE), sample_generators("cpu", range(2), 0), max_points=SIZE**2,
                   condition=LABELS, guidance=Guidance(2.0))
    torch.testing.assert_close(parts, at_once, atol=1e-4, rtol=0)


@pytest.mark.parametrize("conditions, condition", CASES, ids=["class", "vector"])
def test_latents_follow_a_condition(conditions, condition):
    torch.manual_seed(0)
    model = awake(build_latent_model(tiny_latent_config(), conditions))
    config = tiny_latent_config()
    config.diffusion.steps = 20
    diffusion, mean, std = build_diffusion(config, 5), torch.zeros(6), torch.ones(6)

    def latents(given, scale=1.0):
        return sample_latents(model, diffusion, mean, std, sample_generators("cpu", range(2), 0), condition=given,
                              guidance=Guidance(scale))

    followed, free = latents(condition), latents(None)
    assert not torch.allclose(followed, free, atol=1e-2)
    torch.testing.assert_close(latents(condition, 0.0), free)
    torch.testing.assert_close(latents(none_like(condition)), free)
    assert (latents(condition, 2.0) - free).norm() > (followed - free).norm()
