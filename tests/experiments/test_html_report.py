import base64
import io
import re

import pytest
import torch
from PIL import Image

from experiments.lib.html_report import MAX_SIDE, embed, figure, grid, paragraph, picture, section, table
from experiments.lib.plots import line_plot, to_bytes


@pytest.mark.parametrize(("size", "shown", "scale"), [(16, 64, 2), (64, 64, 2), (128, 16, 2), (256, 4, 1), (512, 4, 1)])
def test_a_grid_shows_fewer_large_images(size, shown, scale):
    side = round(shown**0.5)
    content = grid(torch.zeros(80, 3, size, size, dtype=torch.uint8), "many")
    width, height = map(int, re.search(r'width="(\d+)" height="(\d+)"', content).groups())
    assert width == height == side * size * scale


def test_a_grid_of_grey_images_in_columns():
    content = grid(torch.zeros(3, 1, 20, 10, dtype=torch.uint8), "three", columns=3, scale=1)
    assert 'width="30" height="20"' in content and "<figcaption>three</figcaption>" in content


def test_a_large_picture_is_reduced(tmp_path):
    for size, shown in (((30, 20), (30, 20)), ((4 * MAX_SIDE, 40), (MAX_SIDE, 10))):
        Image.new("RGB", size, "red").save(tmp_path / "image.png")
        content = base64.b64decode(re.search('base64,([^"]*)"', picture(tmp_path / "image.png", "red"))[1])
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == shown and image.getpixel((0, 0)) == (255, 0, 0)


def test_text_is_escaped():
    assert table([("a", "b"), ("<1>", 2)]) == (
        '<div class="scroll"><table><tr><th>a</th><th>b</th></tr><tr><td>&lt;1&gt;</td><td>2</td></tr></table></div>')
    for content in (paragraph("<x>"), figure("", "<x>"), section("<x>", "y"),
                    embed(b"", "<x>")):
        assert "&lt;x&gt;" in content and "<x>" not in content


def test_a_section_without_content_is_left_out():
    assert section("empty", "", "") == "" and "<h2>full</h2>" in section("full", "", "y")


def test_plots_hold_no_date():
    def draw(kind):
        return to_bytes(line_plot({"a": [(1, 0.5), (2, 0.1)], "none": []}, "title", "step", "loss", log=True), kind)

    assert draw("svg").startswith(b"<?xml") and draw("png").startswith(b"\x89PNG")
    assert b"<dc:date>" not in draw("svg")
