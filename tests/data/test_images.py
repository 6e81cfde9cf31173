"""Modes, cropping and resizing."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import UNREADABLE, fit, load_image, to_mode, to_tensor


def encoded(image, suffix="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("value", [0, 1, 255, 256, 32768, 65535])
def test_16_bit_pixels_are_scaled_not_clipped(value):
    grey = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
    for suffix in ("png", "tiff"):
        image = load_image(encoded(grey, suffix), (4, 4), 3)
        assert image.shape == (3, 4, 4) and image.dtype == torch.uint8
        assert (image == round(value / 257)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(mode, channels):
    image = Image.new(mode, (5, 3)) if mode == "I;16" else Image.new("RGB", (5, 3)).convert(mode)
    assert to_tensor(to_mode(image, channels)).shape == (channels, 3, 5)


def test_float_pixels_are_unreadable():
    with pytest.raises(UNREADABLE):
        to_mode(Image.new("F", (4, 4)), 3)


@pytest.mark.parametrize(("width", "height", "size", "box"), [
    (40, 20, (10, 10), (10, 0, 30, 20)), (20, 40, (10, 10), (0, 10, 20, 30)), (31, 20, (5, 5), (5, 0, 25, 20)),
    (40, 40, (10, 20), (0, 10, 40, 30)), (40, 40, (20, 5), (15, 0, 25, 40)), (12, 12, (12, 12), (0, 0, 12, 12))])
def test_fit_is_a_centre_crop_and_then_lanczos(width, height, size, box):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    expected = image.crop(box).resize(size[::-1], Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(fit(image, size)), np.asarray(expected))


def test_fit_removes_what_the_target_cannot_hold():
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = np.asarray(fit(Image.fromarray(checkerboard), (16, 16))).astype(int)
    assert abs(small - 127.5).max() < 2


def test_fit_keeps_an_image_of_the_right_size():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(fit(image, (9, 7))), np.asarray(image))


def test_orientation_of_a_camera_is_applied():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    loaded = load_image(encoded(image, exif=exif), (4, 3), 1)
    assert np.array_equal(loaded[0].numpy(), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("content", [
    b"", b"not an image", encoded(Image.new("RGB", (64, 64), "red")).read()[:60],
    encoded(Image.effect_noise((64, 64), 90), "jpeg").read()[:700]],
    ids=["empty", "text", "cut png", "cut jpeg"])
def test_broken_files_raise_what_counts_as_unreadable(content):
    with pytest.raises(UNREADABLE):
        load_image(io.BytesIO(content), (8, 8), 3)


def test_a_decompression_bomb_counts_as_unreadable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UNREADABLE, match="decompression bomb"):
        load_image(encoded(Image.new("RGB", (50, 50))), (8, 8), 3)
