"""Masks of what is known: their areas, their independence of the batch, and what a white pixel of a file means."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.lib.masks import KINDS, make_masks
from utils.errors import UserError

SIZES = [(32, 32), (17, 24), (16, 90)]


def unknown(kind, size=(32, 32), indices=range(4), seed=0, **reading):
    masks = make_masks(kind, size, indices, seed, **reading)
    assert masks.shape == (len(indices), 1, *size) and masks.dtype == torch.bool
    return ~masks


@pytest.mark.parametrize("size", SIZES)
def test_centre_and_half_are_the_same_in_every_image(size):
    height, width = size
    expected = torch.zeros(4, 1, *size, dtype=torch.bool)
    expected[:, :, height // 4:height - height // 4, width // 4:width - width // 4] = True
    assert torch.equal(unknown("centre", size), expected)
    assert torch.equal(unknown("half", size)[..., width // 2:].all(), torch.tensor(True))
    assert not unknown("half", size)[..., :width // 2].any()


@pytest.mark.parametrize("size", SIZES)
def test_a_quarter_of_the_pixels_is_known_in_pixels(size):
    found = unknown("pixels", size)
    assert ((~found).flatten(1).sum(1) == round(size[0] * size[1] / 4)).all()


@pytest.mark.parametrize("size", [*SIZES, (256, 256)])
def test_strokes_cover_a_part(size):
    share = unknown("strokes", size, range(20)).float().mean((1, 2, 3))
    assert share.min() > 0.05 and share.max() < 0.8 and 0.2 < share.mean() < 0.6


@pytest.mark.parametrize("kind", ["strokes", "pixels"])
def test_a_random_mask_is_a_function_of_the_seed_and_the_index(kind):
    found = unknown(kind, indices=[3, 5, 8])
    assert torch.equal(found[1:2], unknown(kind, indices=[5]))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found, unknown(kind, indices=[3, 5, 8], seed=1))


def test_a_mask_whose_white_is_in_doubt_is_refused_until_it_is_given(tmp_path):
    deep = np.zeros((16, 24), dtype=np.uint16)
    deep[:4] = 300
    Image.fromarray(deep).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="nor a readable image .*its brightest pixel is 300.*data.white_level"):
        unknown(str(tmp_path / "mask.png"), (16, 24))
    assert (unknown(str(tmp_path / "mask.png"), (16, 24), white_level=400) == torch.from_numpy(deep > 0)).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_white_is_unknown_in_a_file(tmp_path, mode):
    image = Image.new("L", (24, 16), 0)
    image.paste(255, (20, 0, 24, 4))  # the upper right corner
    image.paste(100, (0, 0, 2, 2))
    image.convert(mode, dither=Image.Dither.NONE).save(tmp_path / "mask.png")
    expected = torch.zeros(16, 24, dtype=torch.bool)
    expected[:4, 20:] = True
    assert torch.equal(unknown(str(tmp_path / "mask.png"), (16, 24), range(2)), expected.expand(2, 1, 16, 24))


def test_mistakes_name_the_flag(tmp_path):
    Image.new("L", (16, 16), 0).save(tmp_path / "black.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    Image.new("L", (16, 8), 255).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("black", "nothing unknown"), ("white", "nothing known"), ("small", "8x16 pixels"),
                          ("text", "neither"), ("absent", "|".join(KINDS))):
        with pytest.raises(UserError, match=f"--mask=.*{name}.*({message})"):
            make_masks(str(tmp_path / f"{name}.png"), (16, 16), range(1), 0)
