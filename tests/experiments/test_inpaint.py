"""inpaint.py on a tiny model."""

import json

import pytest
import torch
from PIL import Image

from data.images import read_image
from experiments.lib.sampling import TrainedAutoencoder
from tests.scripts import only_line, run_script

INPAINT = "experiments/inpaint.py"


def inpaint(trained, output, *flags):
    """({name: list of uint8 images}, scores) of a run."""
    result = run_script(INPAINT, *trained[1], "--sampling_steps=3", "--output", output, *flags)
    assert result.code == 0, result.err
    folders = {name: [read_image(path) for path in sorted((output / name).glob("*.png"))]
               for name in ("originals", "masked", "generated", "results")}
    assert (output / "grid.png").exists()
    return folders, json.loads((output / "scores.json").read_text())


@pytest.mark.parametrize("mask", ["centre", "half", "strokes", "pixels"])
def test_known_pixels_are_kept_and_unknown_pixels_filled(trained, tmp_path, mask):
    images, scores = inpaint(trained, tmp_path / "o", "--mask", mask)
    assert [len(group) for group in images.values()] == [4] * 4 and scores["count"] == 4
    for original, masked, generated, result in zip(*images.values(), strict=True):
        unknown = (masked == 255).all(0)
        assert 0.1 < unknown.float().mean() < 0.9
        assert torch.equal(result[:, ~unknown], original[:, ~unknown])
        assert torch.equal(masked[:, ~unknown], original[:, ~unknown])
        assert (result[:, unknown].int() - generated[:, unknown].int()).abs().max() <= 1
        assert not torch.equal(result[:, unknown], original[:, unknown])
    assert scores["settings"]["mask"] == mask and 0.1 < scores["unknown_share"] < 0.9
    assert scores["psnr_unknown"] < 40 and scores["seam"] > 0


@pytest.mark.slow
def test_consistency_and_guidance_fit_the_known_pixels(trained, tmp_path):
    fits = {name: inpaint(trained, tmp_path / name, "--sampling_steps=15", *flags)[1]["psnr_known"] for name, flags in (
        ("neither", ["--guidance=0"]), ("paper", []), ("limited", ["--limit_guidance"]),
        ("consistency", ["--guidance=0", "--consistency=1"]))}
    assert fits["paper"] > fits["neither"] and fits["limited"] > fits["neither"] + 0.5
    assert fits["consistency"] > fits["neither"] + 4


@pytest.mark.slow
def test_options_change_the_result_and_the_batch_size_does_not(trained, tmp_path):
    plain = inpaint(trained, tmp_path / "plain", "--num_samples=3")[0]["results"]
    assert len(plain) == 3
    same = inpaint(trained, tmp_path / "same", "--num_samples=3", "--config.train.sample_size=3")[0]["results"]
    assert all((a.int() - b.int()).abs().max() <= 1 for a, b in zip(plain, same, strict=True))
    for name, *flags in (("guidance", "--guidance=0"), ("jumps", "--jumps=1"), ("limited", "--limit_guidance"),
                         ("seed", "--config.run.seed=1"),
                         ("consistency", "--consistency=0.5"), ("latent", "--latent_config", trained[2][1])):
        other = inpaint(trained, tmp_path / name, "--num_samples=3", *flags)[0]["results"]
        assert not torch.equal(other[0], plain[0]), name


def test_unknown_pixels_do_not_affect_the_result(trained, tmp_path):
    """Neither the encoder nor the guidance sees them."""
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (3, 2, 12, 9))
    mask.save(tmp_path / "mask.png")
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        image = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        if name == "b":
            image[2:9, 3:12] = 255 - image[2:9, 3:12]
        Image.fromarray(image.numpy()).save(tmp_path / name / "0.png")
        images, _ = inpaint(trained, tmp_path / f"o{name}", "--input", tmp_path / name, "--mask", tmp_path / "mask.png",
                            "--jumps=1")
        results.append(images["results"][0])
    assert torch.equal(*results)


def test_another_resolution_and_shape(trained, tmp_path):
    images, _ = inpaint(trained, tmp_path / "o", "--sample_img_size=18x20", "--num_samples=1", "--mask=half")
    assert images["results"][0].shape == (3, 18, 20)


@pytest.mark.parametrize("flags, named", [
    (["--mask=absent.png"], "--mask=absent.png is neither one of centre"),
    (["--guidance=-1"], "guidance"), (["--guidance=1e30"], "--guidance=1e30"), (["--guidance=nan"], "--guidance=nan"),
    (["--consistency=2"], "consistency"), (["--jumps=-1"], "jumps"),
    (["--sampling_steps=21"], "--sampling_steps=21 must lie"), (["--num_samples=0"], "num_samples"),
    (["--sample_img_size=21"], "less than the 21x21 pixels asked for"), (["--sample_img_size=x"], "sample_img_size"),
    (["--input=absent", "--sample_img_size=16"], "--sample_img_size=16 applies to held-out images"),
    (["--config.run.experiment=absent"], "there is no checkpoint"),
    (["--output=/proc/none"], "--output=/proc/none"),
])
def test_mistakes_are_one_line(trained, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    assert named in only_line(run_script(INPAINT, *trained[1], "--sampling_steps=3", *flags))
    assert not list(tmp_path.iterdir())


def test_a_mask_that_leaves_too_little_is_one_line(trained, tmp_path):
    mask = Image.new("L", (16, 16), 255)
    mask.putpixel((3, 4), 0)
    mask.save(tmp_path / "mask.png")
    line = only_line(run_script(INPAINT, *trained[1], "--mask", tmp_path / "mask.png",
                                "--sampling_steps=3"))
    assert "fewer known pixels than model.knn_neighbours=3" in line


def test_max_points_bounds_the_batch_and_weights_need_no_gradients(trained, tmp_path, monkeypatch):
    batches, decode = [], TrainedAutoencoder.decode

    def recording(self, z, *args, **options):
        batches.append((len(z), any(parameter.requires_grad for parameter in self.decoder.parameters())))
        return decode(self, z, *args, **options)

    monkeypatch.setattr(TrainedAutoencoder, "decode", recording)
    inpaint(trained, tmp_path / "o", "--num_samples=3", "--sample_img_size=18x20", "--config.train.sample_size=3",
            f"--max_points={2 * 18 * 20}")
    assert batches == [(2, False), (1, False)]
