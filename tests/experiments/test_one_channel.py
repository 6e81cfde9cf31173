"""Grey images and functions with one channel, through every script."""

import pytest
import torch

from data.datasets import photos
from data.images import read_image
from tests.data.layouts import write_folder
from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file
from utils.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow


def grey_folder(config, folder):
    write_folder(folder / "data", 120, mode="L")
    config.data.name, config.data.root_dir, config.data.num_workers = "folder", str(folder / "data"), 2


def grey_photos(config, folder):
    config.data.name = "photos"


def fields(config, folder):
    config.data.name, config.data.function = "function", "data.random_fields:gaussian_field"
    config.data.num_functions, config.data.num_heldout_functions, config.data.num_workers = 12, 6, 2


@pytest.mark.parametrize("source", [grey_folder, grey_photos, fields])
def test_every_script(tmp_path, monkeypatch, source):
    monkeypatch.setattr(photos.Photos, "counts", (5, 1))  # of each of 6 photographs
    config, latent = tiny_config(tmp_path / "runs"), tiny_latent_config(tmp_path / "runs")
    config.data.channels = 1
    source(config, tmp_path)
    single = ["--config", write_config_file(config, tmp_path / "ae.py")]
    both = ["--config", write_config_file(latent, tmp_path / "latent.py"), "--decoder_config", single[1]]
    made = tmp_path / "made"

    def run(script, *arguments):
        result = run_script(script, *arguments)
        assert result.code == 0, result.err

    run("train_inf_ae_diffusion.py", *single)
    run("train_latent_diffusion.py", *both)
    run("experiments/generate_samples.py", *both, "--num_samples=4", "--sampling_steps=2", "--sample_img_size=32x24",
        "--output", made / "samples")
    run("experiments/generate_recons.py", *single, "--sampling_steps=2", "--output", made / "recons")
    run("experiments/generate_noise.py", *single, "--output", made / "noise")
    run("experiments/inpaint.py", *single, "--sampling_steps=2", "--num_samples=2", "--output", tmp_path / "inpainted")
    run("experiments/interpolate.py", *single, "--sampling_steps=2", "--num_pairs=1", "--frames=3", "--directions=1",
        "--encodings=5", "--output", tmp_path / "walks")
    if source is not grey_folder:  # its pictures have no more pixels
        run("experiments/super_resolution.py", *single, "--sampling_steps=2", "--num_samples=2", "--output",
            tmp_path / "enlarged")
    run("experiments/calculate_fid.py", *single, "--split=heldout", "--samples", made / "samples", "--neighbours=2",
        "--feature_model=efficientnet_lite0", "--output", made / "scores.json")
    run("experiments/export_weights.py", *single)
    run("experiments/report.py", *both, "--folder", made, "--output", tmp_path / "report.html")

    shapes = {"samples": (1, 32, 24), "recons/originals": (1, 16, 16), "recons/reconstructions": (1, 16, 16),
              "noise": (1, 16, 16)}
    for folder, shape in shapes.items():
        assert read_image(made / folder / "00000.png").shape == shape, folder
    page = (tmp_path / "report.html").read_text()
    for heading in ("Samples", "Reconstructions of held-out images", "Nearest training images", "Scores"):
        assert f"<h2>{heading}</h2>" in page
    for part, count in (("train", 114), ("heldout", 6)) if source is grey_folder else (("heldout", 6),):
        encoded = load_checkpoint(tmp_path / "runs" / "tiny_sampler" / "latents.pt", "latents")[part]
        assert len(encoded) == (2 * count if source is not fields else count)  # functions have no mirror images
        assert torch.isfinite(encoded).all()


def test_functions_are_not_prepared(tmp_path):
    config = tiny_config(tmp_path)
    config.data.channels = 1
    fields(config, tmp_path)
    path = write_config_file(config, tmp_path / "ae.py")
    line = only_line(run_script("data/prepare.py", "--config", path, "--output", tmp_path / "lmdb"))
    assert "data.name='function' is evaluated at any resolution" in line and not (tmp_path / "lmdb").exists()
