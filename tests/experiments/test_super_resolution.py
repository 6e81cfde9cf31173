"""super_resolution.py on a tiny model."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data.images import read_image
from experiments.lib.sampling import TrainedAutoencoder
from tests.data.layouts import write_folder
from tests.scripts import only_line, run_script
from utils.images import to_pil

SUPER_RESOLUTION = "experiments/super_resolution.py"
METHODS = ["bicubic", "lanczos", "backprojected", "decoded", "consistent"]


@pytest.fixture(scope="module")
def flags(trained, tmp_path_factory):
    """Arguments of the tiny model, with 4 held-out images of 40²."""
    folder = tmp_path_factory.mktemp("larger")
    write_folder(folder, 80, width=40, height=40)
    return [*trained[1], f"--config.data.root_dir={folder}", "--sampling_steps=3"]


def enlarge(flags, output, *more):
    """({name: list of uint8 images}, scores) of a run."""
    result = run_script(SUPER_RESOLUTION, *flags, "--output", output, "--consistency=1", *more)
    assert result.code == 0, result.err
    folders = {path.name: [read_image(file) for file in sorted(path.glob("*.png"))]
               for path in output.iterdir() if path.is_dir()}
    assert (output / "grid.png").exists()
    return folders, json.loads((output / "scores.json").read_text())


def resized(images, size):
    """uint8 images [C, H, W], reduced and clipped, as float."""
    return F.interpolate(torch.stack(images).float(), size, mode="bicubic", antialias=True).clamp(0, 255)


def test_every_method_enlarges_and_consistent_results_reduce_to_the_input(flags, tmp_path):
    images, scores = enlarge(flags, tmp_path / "o")
    assert set(images) == {"inputs", "truth", *METHODS} and list(scores["methods"]) == METHODS
    assert {image.shape for name in images for image in images[name]} == {(3, 16, 16), (3, 32, 32)}
    low = torch.stack(images["inputs"]).float()
    assert (resized(images["truth"], (16, 16)) - low).abs().max() <= 0.51  # rounded to 8 bits
    for name in ("backprojected", "consistent"):
        assert (resized(images[name], (16, 16)) - low).abs().max() < 4  # where no image has the input exactly
        assert scores["methods"][name]["consistency_psnr"] > 50
    assert scores["methods"]["decoded"]["consistency_psnr"] < 20  # the network has learned nothing
    for small, bicubic, lanczos in zip(*(images[name] for name in ("inputs", "bicubic", "lanczos")), strict=True):
        for result, method in ((bicubic, Image.Resampling.BICUBIC), (lanczos, Image.Resampling.LANCZOS)):
            assert torch.equal(result, torch.tensor(list(to_pil(small).resize((32, 32), method).tobytes()),
                                                    dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1))
    for row in scores["methods"].values():
        assert set(row) == {"psnr", "ssim", "consistency_psnr"} and -1 <= row["ssim"] <= 1
    assert scores["methods"]["bicubic"]["psnr"] > 25  # the pictures are smooth


def test_a_folder_of_small_images_has_no_truth(flags, tmp_path):
    write_folder(tmp_path / "small", 3, width=18, height=16)
    images, scores = enlarge(flags, tmp_path / "o", "--input", tmp_path / "small", "--sample_img_size=33x40",
                             "--num_samples=2")
    assert "truth" not in images and [image.shape for image in images["consistent"]] == [(3, 33, 40)] * 2
    assert torch.equal(images["inputs"][1], read_image(tmp_path / "small" / "00001.png"))
    assert set(scores["methods"]["bicubic"]) == {"consistency_psnr"} and scores["count"] == 2
    assert scores["methods"]["consistent"]["consistency_psnr"] > 50


@pytest.mark.slow
def test_options_change_the_result_and_the_batch_size_does_not(flags, tmp_path):
    first, _ = enlarge(flags, tmp_path / "first", "--num_samples=3", "--config.train.sample_size=2")
    again, _ = enlarge(flags, tmp_path / "again", "--num_samples=3", "--config.train.sample_size=3",
                       "--max_points=1500")
    for name in METHODS:
        assert all((a.int() - b.int()).abs().max() <= 1 for a, b in zip(first[name], again[name], strict=True))
    for name, *more in (("eta", "--eta=1"), ("sampler", "--sampler=ddpm"), ("seed", "--config.run.seed=1"),
                         ("weight", "--consistency=0.5"), ("input", "--input_img_size=18", "--sample_img_size=32")):
        other, _ = enlarge(flags, tmp_path / name, "--num_samples=1", *more)
        assert not torch.equal(other["consistent"][0], first["consistent"][0]), name
    assert run_script(SUPER_RESOLUTION, *flags, "--output", tmp_path / "without", "--num_samples=1").code == 0
    assert not (tmp_path / "without" / "consistent").exists()  # which is not the paper's method
    without = read_image(tmp_path / "without" / "decoded" / "00000.png")
    assert (without.int() - first["decoded"][0].int()).abs().max() <= 1


@pytest.mark.parametrize("wrong, named", [
    (["--scale=1"], "scale"), (["--scale=4"], "is 40x40, less than the 64x64 pixels asked for"),
    (["--scale=2", "--sample_img_size=32"], "--scale=2 and --sample_img_size=32"),
    (["--sample_img_size=16"], "--sample_img_size=16x16 is no larger than the inputs, 16x16"),
    (["--sample_img_size=20x8"], "--sample_img_size=20x8"), (["--input_img_size=4"], "--input_img_size=4"),
    (["--input=x", "--input_img_size=16"], "--input_img_size=16 applies to held-out images"),
    (["--input=absent"], "--input=absent is not a folder"), (["--consistency=nan"], "--consistency=nan"),
    (["--eta=1", "--sampler=ddpm"], "--eta=1.0 applies to --sampler=ddim only"), (["--max_points=5"], "--max_points=5"),
    (["--config.model.z_dim=0"], "without an encoder"),
])
def test_mistakes_are_one_line(flags, tmp_path, monkeypatch, wrong, named):
    monkeypatch.chdir(tmp_path)
    assert named in only_line(run_script(SUPER_RESOLUTION, *flags, *wrong)) and not list(tmp_path.iterdir())


def test_max_points_bounds_the_batch(flags, tmp_path, monkeypatch):
    batches, decode = [], TrainedAutoencoder.decode
    monkeypatch.setattr(TrainedAutoencoder, "decode", lambda self, z, *args, **options: (
        batches.append(len(z)), decode(self, z, *args, **options))[1])
    enlarge(flags, tmp_path / "o", "--consistency=0", "--num_samples=3", "--config.train.sample_size=3", "--scale=2",
            f"--max_points={2 * 32 * 32}")
    assert batches == [2, 1]
