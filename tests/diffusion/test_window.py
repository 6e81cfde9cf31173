"""A window of an image, sampled alone, is that part of the whole image."""

import pytest
import torch
import torch.nn.functional as F

from data.conditions import Conditions
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.sampling import Guidance, decode
from diffusion.window import check_window, decode_window
from models.build import build_decoder
from tests.models.tiny import awake, tiny_config
from utils.errors import UserError
from utils.rng import sample_generators

STEPS = 6


def model(img_size=32, sampler=None, **fields):
    """(decoder, diffusion, z) with kernels of 3 pixels at the training resolution; keywords are fields of diffusion."""
    config = tiny_config()
    config.data.img_size = img_size
    config.diffusion.update(fields)
    torch.manual_seed(0)
    decoder = awake(build_decoder(config))
    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    return decoder, build_diffusion(config, STEPS, sampler), z


def generators():
    return sample_generators("cpu", range(2), "image")


def error(actual, expected):
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize("objective, sampler, eta", [
    ("ddpm", "ddim", 0.0), ("ddpm", "ddim", 0.7), ("ddpm", "ddpm", 0.0), ("ddpm", "dpm_solver", 0.0),
    ("flow", "heun", 0.0), ("few_step", "jump", 0.0)])
@pytest.mark.parametrize("rows, columns", [((8, 24), (10, 20)), ((0, 12), (25, 32)), ((0, 32), (0, 32))])
def test_at_the_training_resolution_it_is_exact(objective, sampler, eta, rows, columns):
    decoder, diffusion, z = model(sampler=sampler, objective=objective)
    whole = decode(decoder, diffusion, z, (32, 32), generators=generators(), eta=eta)
    window = decode_window(decoder, diffusion, z, (32, 32), (rows, columns), generators=generators(), eta=eta)
    torch.testing.assert_close(window, whole[..., slice(*rows), slice(*columns)], rtol=0, atol=2e-3)


def test_a_window_follows_its_condition_with_guidance():
    config, options = tiny_config(), {"condition": torch.tensor([0, 2]), "guidance": Guidance(2.0, (0.0, 0.7))}
    config.data.img_size = 32
    torch.manual_seed(0)
    decoder = awake(build_decoder(config, Conditions("class", 3)))
    diffusion, z = build_diffusion(config, STEPS), torch.zeros(2, 6)
    whole = decode(decoder, diffusion, z, (32, 32), generators=generators(), **options)
    window = decode_window(decoder, diffusion, z, (32, 32), ((8, 24), (10, 20)), generators=generators(), **options)
    torch.testing.assert_close(window, whole[..., 8:24, 10:20], rtol=0, atol=2e-3)
    assert not torch.allclose(whole[0], whole[1], atol=0.1)


@pytest.mark.parametrize("mean_type", ["mollified_epsilon", "v", "xstart"])
def test_margins_suffice_where_the_image_goes_on_beyond_them(mean_type):
    decoder, diffusion, z = model(img_size=64, model_mean_type=mean_type)
    whole = decode(decoder, diffusion, z, (64, 64), generators=generators())[..., 28:36, 30:33]
    window = decode_window(decoder, diffusion, z, (64, 64), ((28, 36), (30, 33)), generators=generators())
    assert error(window, whole) < 0.015


@pytest.mark.parametrize("size, rows, columns", [((64, 64), (20, 44), (0, 24)), ((48, 80), (30, 48), (33, 60))])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_at_a_higher_resolution_it_is_closer_than_the_whole_at_the_training_resolution(size, rows, columns, eta):
    decoder, diffusion, z = model()
    large, small = (decode(decoder, diffusion, z, one, generators=generators(), eta=eta) for one in (size, (32, 32)))
    part = large[..., slice(*rows), slice(*columns)]
    window = decode_window(decoder, diffusion, z, size, (rows, columns), generators=generators(), eta=eta)
    interpolated = F.interpolate(small, size, mode="bicubic")[..., slice(*rows), slice(*columns)]
    assert window.shape == part.shape
    assert error(window, part) < 0.3 * error(interpolated, part) and error(window, part) < 0.1


def test_the_network_sees_the_window_and_the_small_image_and_no_more():
    decoder, diffusion, z = model()
    points = []
    for block in [*decoder.points_to_grid.blocks, *decoder.blocks]:
        block.register_forward_pre_hook(lambda module, args: points.append(args[0].shape[1]))
    decode_window(decoder, diffusion, z, (256, 256), ((100, 116), (100, 116)), generators=generators())
    assert max(points) < 0.5 * 256**2
    for most in (2000, 20_000):
        points.clear()
        parts = decode_window(decoder, diffusion, z, (64, 64), ((30, 40), (30, 40)), generators=generators(),
                              max_points=most)
        assert max(points) <= most
        whole = decode_window(decoder, diffusion, z, (64, 64), ((30, 40), (30, 40)), generators=generators())
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-3)


def test_progress_adds_up_to_the_steps():
    decoder, diffusion, z = model()
    for most in (None, 3000):
        seen = []
        decode_window(decoder, diffusion, z, (32, 32), ((0, 9), (3, 7)), generators=generators(), progress=seen.append,
                      max_points=most)
        assert sum(seen) == pytest.approx(STEPS)


def test_without_a_mollifier_it_is_refused():
    _, diffusion, _ = model(gaussian_filter_std=0.0)
    with pytest.raises(UserError, match="--window needs a model with diffusion.gaussian_filter_std above 0"):
        check_window(diffusion)
