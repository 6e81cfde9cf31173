"""In parts, the networks say what they say of the whole image."""

import pytest
import torch

from data.coordinates import Coordinates
from data.window import Window
from models import tiles
from models.tiles import Context, decoder_context, decoder_in_parts, encoder_in_parts, reach, read_back
from tests.memory import PeakMemory
from tests.models.tiny import draw, tiny_decoder, tiny_encoder
from utils.errors import UserError

# (size, max_points, KEPT): whole rows and squares, halos clipped on one side and both, one tile and many
CASES = [((32, 32), 200, 4), ((32, 32), 600, 1), ((48, 20), 150, 4), ((17, 41), 170, 3), ((19, 64), 500, 1),
         ((64, 64), 1200, 1), ((16, 16), 60, 1)]


@pytest.fixture
def work(monkeypatch):
    """Points that each call of a block took, filled in as they are called."""
    taken = []

    def watch(model):
        for name, module in model.named_modules():
            if name.split(".")[-2:-1] == ["blocks"]:
                module.register_forward_pre_hook(lambda module, args: taken.append(args[0].shape[:2].numel()))
        return model

    return watch, taken


def inputs(size, batch):
    values, t, z, _ = draw(batch, size, share=1)
    return values, t, z, Coordinates.full(batch, size)


@pytest.mark.parametrize("size, max_points, kept", CASES)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_decoder(monkeypatch, work, size, max_points, kept, batch):
    monkeypatch.setattr(tiles, "KEPT", kept)
    values, t, z, coords = inputs(size, batch)
    watch, taken = work
    decoder = tiny_decoder()
    expected = decoder(values, t, z, coords)
    out = decoder_in_parts(watch(decoder), values, t, z, coords, max_points * batch)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert out.dtype == expected.dtype and max(taken) <= max_points * batch and len(taken) > 8


@pytest.mark.parametrize("size, max_points, kept", CASES)
def test_the_encoder(monkeypatch, work, size, max_points, kept):
    monkeypatch.setattr(tiles, "KEPT", kept)
    values, _, _, coords = inputs(size, 2)
    watch, taken = work
    for options in ({}, {"stochastic_encoding": True}):
        encoder = tiny_encoder(**options)
        expected = encoder(values, coords)
        out = encoder_in_parts(watch(encoder), values, coords, max_points * 2)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert max(taken) <= max_points * 2 and len(taken) > 4


@pytest.mark.parametrize("size", [(16, 16), (40, 24)])
def test_a_grid_finer_than_the_image_and_full_kernels(size):
    values, t, z, coords = inputs(size, 1)
    for options in ({"uno_res": 32, "uno_attn_resolutions": ()}, {"depthwise_sparse": False}, {"kernel_size": 1},
                    {"backend": "torch_dense"}):
        decoder = tiny_decoder(**options)
        out = decoder_in_parts(decoder, values, t, z, coords, 120)
        torch.testing.assert_close(out, decoder(values, t, z, coords), rtol=1e-4, atol=1e-5)


def test_a_window_needs_only_the_points_within_reach():
    """From what all points share and the values around it, and not a pixel fewer."""
    size, decoder = (40, 56), tiny_decoder()
    values, t, z, _ = inputs(size, 2)
    image, target = Window.whole(2, size), Window(2, size, (4, 12), (30, 41))
    expected = target.take(decoder(values, t, z, Coordinates.full(2, size)), image)
    context = decoder_context(decoder, values, t, z, image, 1000)
    halo = reach(decoder, size)
    source = target.grown(halo)
    assert source.num_points < image.num_points
    out = read_back(decoder, Context(context.grid, None), source.take(values, image), source, target, t, z, 500)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    closer = target.grown((halo[0] - 1, halo[1]))
    changed = torch.full_like(values, 9.0)
    closer.put(closer.take(values, image), image, changed)
    out = read_back(decoder, Context(context.grid, None), source.take(changed, image), source, target, t, z, 500)
    assert (out - expected).abs().max() > 1e-6


def test_small_images_are_left_to_the_model_itself():
    values, t, z, coords = inputs((16, 16), 2)
    decoder, encoder = tiny_decoder(), tiny_encoder()
    for max_points in (None, 512):
        assert torch.equal(decoder_in_parts(decoder, values, t, z, coords, max_points), decoder(values, t, z, coords))
        assert torch.equal(encoder_in_parts(encoder, values, coords, max_points), encoder(values, coords))


@pytest.mark.parametrize("options, most", [
    ({"kernel_size": 1, "num_conv_blocks": 1}, {4096: 5, 1024: 1.6}),  # halos leave room for tiles
    ({}, {4096: 7}),  # they do not: 3 features of each point are kept, and 1 given back
])
def test_memory_follows_max_points(options, most):
    """Peak memory, in features of every point of the image; at once it takes 8 or more."""
    decoder, peaks = tiny_decoder(nf=16, **options), {}
    values, t, z, coords = inputs((128, 128), 1)
    for max_points in (None, *most):
        with torch.no_grad(), PeakMemory() as memory:
            decoder_in_parts(decoder, values, t, z, coords, max_points)
        peaks[max_points] = memory.peak / (coords.num_points * 16 * 4)
    assert peaks[None] > 7.5
    assert all(peaks[max_points] < bound for max_points, bound in most.items()), peaks


def test_mixed_precision_stays_close():
    values, t, z, coords = inputs((40, 32), 1)
    decoder = tiny_decoder()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = decoder_in_parts(decoder, values, t, z, coords, 300), decoder(values, t, z, coords)
    assert out.dtype == torch.float32
    assert (out - expected).square().mean().sqrt() < 0.02 * expected.std()


@pytest.mark.parametrize("size, least", [((32, 48), 252), ((128, 128), 2500)])  # kernels of 7x9 and 25x25 pixels
def test_too_few_points_for_the_kernels_are_refused(size, least):
    values, t, z, coords = inputs(size, 2)
    with pytest.raises(UserError, match=f"--max_points={least // 2} .* {size[0]}x{size[1]}, .* least {least}"):
        decoder_in_parts(tiny_decoder(), values, t, z, coords, least // 2)
    assert decoder_in_parts(tiny_decoder(num_conv_blocks=1), values, t, z, coords, least).shape == values.shape
