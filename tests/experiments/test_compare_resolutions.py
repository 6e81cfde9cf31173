"""compare_resolutions.py on one smooth function at several sizes, whose images must agree."""

import json

import pytest
import torch

from experiments.lib.image_folders import ImageFolder
from tests.scripts import only_line, run_script

SCRIPT = "experiments/compare_resolutions.py"


def function(phase, size):
    """A wave of a few periods at pixel centres, float32 [3, H, W] in [−1, 1]."""
    y, x = ((torch.arange(length) + 0.5) / length for length in size)
    return (0.8 * torch.sin(9 * x + 5 * y[:, None] + phase)).expand(3, -1, -1)


def write(folder, size, window=None, count=3):
    """A folder like that of generate_samples.py: images of different phases, or a window of them."""
    made = ImageFolder(folder, count, {"size": list(size), "window": window})
    (top, bottom), (left, right) = window or [(0, size[0]), (0, size[1])]
    images = torch.stack([function(phase, size) for phase in range(count)])
    made.save(range(count), images[..., top:bottom, left:right])
    return folder


def figures(tmp_path, reference, *samples):
    output = tmp_path / "figures.json"
    result = run_script(SCRIPT, "--reference", reference, "--samples", ",".join(map(str, samples)), "--output", output)
    assert result.code == 0 and len(result.out.splitlines()) == len(samples), result.err
    return json.loads(output.read_text())


def test_one_function_at_other_sizes_is_the_same_image(tmp_path):
    small = write(tmp_path / "1x", (32, 32))
    larger = [write(tmp_path / "x".join(map(str, size)), size) for size in ((64, 64), (48, 96))]
    for row, size in zip(figures(tmp_path, small, *larger), ([64, 64], [48, 96]), strict=True):
        assert row["size"] == size and row["count"] == 3
        assert row["least_psnr"] > 35 and row["psnr"] >= row["least_psnr"] and row["psnr_of_others"] < 12
    assert figures(tmp_path, larger[0], small)[0]["psnr"] == figures(tmp_path, small, larger[0])[0]["psnr"]


def test_detail_finer_than_the_smaller_image_is_ignored(tmp_path):
    """A checkerboard of pixels; subsampling by three would keep it."""
    smooth, fine = ImageFolder(tmp_path / "1x", 2, {}), ImageFolder(tmp_path / "3x", 2, {})
    smooth.save(range(2), torch.zeros(2, 3, 32, 32))
    row, column = torch.arange(96)[:, None], torch.arange(96)
    fine.save(range(2), (0.4 * (-1.0) ** (row + column)).expand(2, 3, -1, -1))
    assert figures(tmp_path, smooth.path, fine.path)[0]["least_psnr"] > 30


def test_a_constant_difference_has_its_psnr(tmp_path):
    for name, value in (("a", 0.0), ("b", 10 / 127.5)):
        folder = ImageFolder(tmp_path / name, 2, {"size": [32, 32], "window": None})
        folder.save(range(2), torch.full((2, 3, 32, 32), value))
    row = figures(tmp_path, tmp_path / "a", tmp_path / "b")[0]
    assert row["psnr"] == row["psnr_of_others"] == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)


def test_a_window_is_compared_with_its_place(tmp_path):
    whole, window = write(tmp_path / "whole", (64, 48)), [[16, 40], [10, 31]]
    assert figures(tmp_path, whole, write(tmp_path / "part", (64, 48), window))[0]["least_psnr"] == 100
    elsewhere = write(tmp_path / "elsewhere", (64, 48), [[17, 41], [10, 31]])
    (elsewhere / "settings.json").write_text(json.dumps({"size": [64, 48], "window": window}))
    assert figures(tmp_path, whole, elsewhere)[0]["psnr"] < 40


@pytest.mark.parametrize("content", ["{", "[1]", '{"window": null}'])
def test_images_without_a_readable_record_are_whole(tmp_path, content):
    whole, again = write(tmp_path / "whole", (32, 32)), write(tmp_path / "again", (32, 32))
    (again / "settings.json").write_text(content)
    assert figures(tmp_path, whole, again)[0]["least_psnr"] == 100


def test_mistakes_are_one_line(tmp_path):
    whole = write(tmp_path / "whole", (32, 32))
    other = write(tmp_path / "other", (64, 64), [[0, 32], [0, 32]])
    single = write(tmp_path / "single", (32, 32), count=1)
    for flags, named in (
        ([], "--samples is missing"),
        (["--samples", whole], "--reference=None must be a folder with two images or more"),
        (["--reference", whole, "--samples", tmp_path / "absent"], "absent must be a folder with two images or more"),
        (["--reference", whole, "--samples", single], "single must be a folder with two images or more"),
        (["--reference", whole, "--samples", other], f"--reference={whole} has images of [32, 32] pixels; the windows"),
    ):
        assert named in only_line(run_script(SCRIPT, *flags))
