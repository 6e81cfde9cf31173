"""8-bit pictures: rounding, tiling, files."""

import pytest
import torch

from data.images import read_header, read_image
from utils.images import save_png, tile, to_uint8


def test_rounds_and_clips():
    values = torch.tensor([-2.0, -1.0, -1 + 1.4 / 255, -1 + 0.6 / 255 * 2, 0.0, 1.0, 3.0]).view(1, 1, 1, -1)
    assert to_uint8(values).flatten().tolist() == [0, 0, 1, 1, 128, 255, 255]


def test_every_8_bit_value_survives():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)


def test_png_round_trip_for_any_number_of_channels(tmp_path):
    for channels in (1, 2, 3, 5):
        image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
        save_png(image, tmp_path / "x.png")
        assert torch.equal(read_image(tmp_path / "x.png"), image) and read_header(tmp_path / "x.png")[0] == (5, 7)
        assert torch.equal(read_image(tmp_path / "x.png", channels), image)
    with pytest.raises(ValueError, match="does not hold 2 channels"):
        read_image(tmp_path / "x.png", 2)
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


def test_tile_places_images_row_by_row():
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 4)
    sheet = tile(images, columns=2)
    assert sheet.shape == (1, 4, 8)
    assert (sheet[0, :2, :4] == 0).all() and (sheet[0, :2, 4:] == 1).all() and (sheet[0, 2:, :4] == 2).all()
    assert (sheet[0, 2:, 4:] == 255).all()
