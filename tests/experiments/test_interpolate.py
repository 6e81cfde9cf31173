"""interpolate.py on a tiny model."""

import json

import pytest
import torch
from PIL import Image

from data.images import read_image
from tests.data.layouts import picture
from tests.scripts import only_line, run_script

INTERPOLATE = "experiments/interpolate.py"


def interpolate(trained, output, *flags):
    """({folder: list of uint8 images}, scores) of a run of 5 frames."""
    result = run_script(INTERPOLATE, *trained[1], "--sampling_steps=3", "--frames=5",
                        "--directions=2", "--encodings=10", "--output", output, *flags)
    assert result.code == 0, result.err
    folders = {path.name: [read_image(file) for file in sorted(path.glob("*.png"))]
               for path in output.iterdir() if path.is_dir()}
    return folders, json.loads((output / "scores.json").read_text())


def test_paths_of_pairs_and_directions_as_strips_grids_and_animations(trained, tmp_path):
    images, scores = interpolate(trained, tmp_path / "o")
    assert {name: len(group) for name, group in images.items()} == {
        "originals": 4, "frames": 2 * 5, "frames_strips": 2, "directions": 2 * 2 * 5, "directions_strips": 4}
    assert torch.equal(images["frames_strips"][1], torch.cat(images["frames"][5:], dim=2))
    for name, columns, rows in (("frames", 5 + 2, 2), ("directions", 5, 4)):
        with Image.open(tmp_path / "o" / f"{name}.png") as sheet, Image.open(tmp_path / "o" / f"{name}.gif") as frames:
            assert sheet.size == (columns * 96, 16 + rows * 96)
            assert frames.size[0] % 96 == 0 and 1 <= frames.n_frames <= 8  # there and back; equal ones become one
    assert len(scores["explained_variance"]) == 2 and 0 < sum(scores["explained_variance"]) <= 1
    assert scores["pairs"] == 2 and scores["settings"]["start"] == "invert"
    # the middle of each direction is the image itself, and so is the start of its path to the other image
    assert all((images["directions"][line * 5 + 2].int() - images["frames"][line // 2 * 5].int()).abs().max() <= 1
               for line in range(4))


@pytest.mark.slow
def test_paths_from_inverted_states_end_at_the_images(trained, tmp_path):
    flags = "--directions=0", "--sampling_steps=20"
    inverted, noise = (interpolate(trained, tmp_path / start, *flags, f"--start={start}")
                       for start in ("invert", "noise"))
    for place, original in zip((0, 4, 5, 9), inverted[0]["originals"], strict=True):
        assert (inverted[0]["frames"][place].float() - original.float()).abs().mean() < 8
    assert inverted[1]["psnr_of_the_mollifier"] > inverted[1]["psnr_of_the_ends"] > 30
    assert noise[1]["psnr_of_the_ends"] < 15 and "directions" not in inverted[0]


def test_paths_between_samples_end_at_those_of_generate_samples(trained, tmp_path):
    images, scores = interpolate(trained, tmp_path / "o", "--latent_config", trained[2][1], "--num_pairs=1",
                          "--sample_img_size=20x16")
    assert "originals" not in images and "psnr_of_the_ends" not in scores
    made = run_script("experiments/generate_samples.py", "--config", trained[2][1], "--decoder_config",
                      trained[1][1], "--sampling_steps=3", "--num_samples=2", "--sample_img_size=20x16",
                      "--output", tmp_path / "s")
    assert made.code == 0
    for frame, sample in ((images["frames"][0], "00000.png"), (images["frames"][4], "00001.png")):
        assert (frame.int() - read_image(tmp_path / "s" / sample).int()).abs().max() <= 1


def test_images_of_a_folder_at_their_own_size(trained, tmp_path):
    for i in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        picture(i, 24, 18).save(tmp_path / "in" / f"{i}.png")
    images, scores = interpolate(trained, tmp_path / "o", "--input", tmp_path / "in", "--max_points=1000")
    assert scores["pairs"] == 1 and images["frames"][0].shape == (3, 18, 24)
    assert torch.equal(images["originals"][1], read_image(tmp_path / "in" / "1.png"))


@pytest.mark.parametrize("flags, named", [
    (["--frames=1"], "frames"), (["--num_pairs=0"], "num_pairs"), (["--reach=inf"], "--reach=inf"),
    (["--start=x"], "start"),
    (["--directions=7"], "--directions=7 must be at most model.z_dim=6"), (["--encodings=1"], "encodings"),
    (["--latent_config={latent}", "--start=invert"], "--start=invert need images"),
    (["--latent_config={latent}", "--input=x"], "--latent_config interpolates samples"),
    (["--input={one}"], "there is only one"), (["--max_points=5"], "--max_points=5"),
])
def test_mistakes_are_one_line(trained, tmp_path, monkeypatch, flags, named):
    one, here = tmp_path / "one", tmp_path / "here"
    one.mkdir(), here.mkdir()
    picture(0).save(one / "0.png")
    monkeypatch.chdir(here)
    flags = [flag.format(latent=trained[2][1], one=one) for flag in flags]
    result = run_script(INTERPOLATE, *trained[1], "--sampling_steps=3", *flags)
    assert named in only_line(result) and not list(here.iterdir())
