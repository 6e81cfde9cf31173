"""Modes, cropping and resizing."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import UNREADABLE, fit, list_images, load_image, read_header, read_image, to_mode, to_tensor


def encoded(image, suffix="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("value", [0, 4096, 5000, 32768, 65535])
def test_16_bit_pixels_are_scaled_not_clipped(value):
    grey = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
    for suffix in ("png", "tiff"):
        image = load_image(encoded(grey, suffix), (4, 4), 3)
        assert image.shape == (3, 4, 4) and image.dtype == torch.uint8
        assert (image == round(value / 257)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(mode, channels):
    image = Image.new("RGB", (5, 3)).convert(mode)
    assert to_tensor(to_mode(image, channels)).shape == (channels, 3, 5)


def deep(values, dtype, suffix, **options):
    return encoded(Image.fromarray(np.array([values], dtype=dtype)), suffix, **options)


@pytest.mark.parametrize("file, values", [
    (deep([0, 100, 4095], np.uint16, "png"), None), (deep([0, 255], np.uint16, "tiff"), None),
    (deep([0, 100, 4095], np.int32, "tiff"), None), (deep([0, 0.5, 1], np.float32, "tiff"), None),
    (deep([0, 2047, 4095], np.uint16, "tiff", tiffinfo={281: 4095}), [0, 127, 255]),
    (io.BytesIO(b"P5 2 1 4095\n" + np.array([0, 4095], ">u2").tobytes()), [0, 255])],
    ids=["12 bits as 16", "8 bits as 16", "int32", "float", "maximum in the header", "PGM"])
def test_white_of_deep_pixels_is_declared_or_asked_for(file, values):
    if values is not None:
        assert read_image(file, 1).flatten().tolist() == values
        return
    with pytest.raises(UNREADABLE, match="set data.white_level"):
        read_image(file, 1)
    file.seek(0)
    with Image.open(file) as image:
        white = float(np.asarray(image).max())
    file.seek(0)
    assert read_image(file, 1, white_level=white).flatten().tolist()[::2] in ([0, 255], [0])
    file.seek(0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(mode):
    image = Image.new("RGBA", (3, 1), (200, 200, 200, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    file = encoded(image.convert(mode)) if mode != "P" else encoded(image.quantize(4))
    for background, value in (("white", 255), ("#102030", None)):
        pixels = read_image(file, 3, background)
        file.seek(0)
        assert (pixels[:, 0, [0, 2]] == 200).all()
        assert pixels[:, 0, 1].tolist() == ([value] * 3 if value else [0x10, 0x20, 0x30])


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SyntaxError, OSError])
def test_whatever_a_decoder_raises_counts_as_unreadable(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error("some decoder")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UNREADABLE):
        read_image(io.BytesIO(b""))


def test_folders_are_listed_with_links_and_what_is_left_out_is_counted(tmp_path):
    for name in ("b/1.png", "a.JPG", "c.gif", "c.txt", ".hidden.png", ".git/2.png", "._a.jpg"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    other, nowhere = tmp_path / "other", tmp_path / "nowhere"
    other.mkdir()
    (other / "3.png").touch()
    for name, target in (("linked", other), ("twice", other), ("loop", tmp_path / "root"), ("lost.png", nowhere),
                         ("lost", nowhere), ("file.png", other / "3.png"), ("self.png", tmp_path / "root/self.png")):
        (tmp_path / "root" / name).symlink_to(target)
    found, left_out = list_images(tmp_path / "root")
    assert found == ["a.JPG", "b/1.png", "file.png", "linked/3.png"]
    assert left_out == {".gif files": 1, ".txt files": 1, "links that lead nowhere": 3}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folders_that_cannot_be_read_are_counted(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert list_images(tmp_path) == ([], {"folders that cannot be read": 1})


def test_a_large_colour_profile_is_no_reason_to_refuse_an_image():
    assert read_image(encoded(Image.new("L", (2, 2)), icc_profile=bytes(2**21))).shape == (1, 2, 2)


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


def test_orientation_of_a_camera_is_applied():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    loaded = load_image(encoded(image, exif=exif), (4, 3), 1)
    assert np.array_equal(loaded[0].numpy(), np.rot90(np.asarray(image), -1))
    for suffix in ("png", "jpeg", "webp", "tiff"):
        header = read_header(encoded(image, suffix, exif=exif))
        assert header == ((4, 3), False) and read_image(encoded(image, suffix, exif=exif)).shape[1:] == header[0]


@pytest.mark.parametrize("exif", [b"garbage", b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0"],
                         ids=["damaged", "orientation 9"])
@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp"])
def test_an_orientation_that_makes_no_sense_is_ignored(suffix, exif):
    file = encoded(Image.new("L", (4, 3)), suffix, exif=b"Exif\0\0" + exif)
    assert read_header(file) == ((3, 4), False) and read_image(file).shape[1:] == (3, 4)


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
