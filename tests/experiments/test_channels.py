"""Grey images, and functions with two channels, through every script."""

import numpy as np
import pytest
import torch

from data.datasets import photos
from data.images import read_image
from tests.data.layouts import write_folder
from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file
from utils.checkpoint import load_checkpoint
from utils.images import to_uint8

pytestmark = pytest.mark.slow


def grey_folder(config, folder):
    write_folder(folder / "data", 120, mode="L")
    config.data.name, config.data.root_dir, config.data.num_workers = "folder", str(folder / "data"), 2


def grey_photos(config, folder):
    config.data.name = "photos"


def pairs(config, folder):
    config.data.name, config.data.function = "function", "data.random_fields:poisson_pair"
    config.data.channels = 2
    config.data.num_functions, config.data.num_heldout_functions, config.data.num_workers = 12, 8, 2


@pytest.mark.parametrize("source", [grey_folder, grey_photos, pairs])
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
        "--save_npy", "--output", made / "samples")
    run("experiments/generate_recons.py", *single, "--sampling_steps=2", "--output", made / "recons")
    run("experiments/generate_noise.py", *single, "--output", made / "noise")
    run("experiments/inpaint.py", *single, "--sampling_steps=2", "--num_samples=2", "--output", tmp_path / "inpainted")
    run("experiments/interpolate.py", *single, "--sampling_steps=2", "--num_pairs=1", "--frames=3", "--directions=1",
        "--encodings=5", "--output", tmp_path / "walks")
    if source is not grey_folder:  # its pictures have no more pixels
        run("experiments/super_resolution.py", *single, "--sampling_steps=2", "--num_samples=2", "--output",
            tmp_path / "enlarged")
    run("experiments/inverse_problem.py", *single, "--operator=points:9@0", "--sampling_steps=2", "--num_samples=1",
        "--num_posterior_samples=2", "--output", tmp_path / "solved")
    scoring = ["experiments/calculate_fid.py", *single, "--split=heldout", "--samples", made / "samples",
               "--neighbours=2", "--feature_model=efficientnet_lite0", "--output", made / "scores.json"]
    if source is pairs:
        assert "feature networks score images of 1 or 3 channels only" in only_line(run_script(*scoring))
        run("experiments/spectrum.py", *single, "--samples", made / "samples", "--output", tmp_path / "spectrum")
    else:
        run(*scoring)
    run("experiments/export_weights.py", *single)
    run("experiments/report.py", *both, "--folder", made, "--output", tmp_path / "report.html")

    channels = config.data.channels
    for folder, size in {"samples": (32, 24), "recons/originals": (16, 16), "recons/reconstructions": (16, 16),
                         "noise": (16, 16)}.items():
        assert read_image(made / folder / "00000.png").shape == (channels, *size), folder
    exact = np.load(made / "samples" / "00000.npy")
    assert exact.dtype == np.float32 and exact.shape == (channels, 32, 24)
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(exact)), read_image(made / "samples" / "00000.png"))
    page = (tmp_path / "report.html").read_text()
    for heading in ("Samples", "Reconstructions of held-out images", "Nearest training images",
                    *(["Scores"] if source is not pairs else [])):
        assert f"<h2>{heading}</h2>" in page
    encoded = load_checkpoint(tmp_path / "runs" / "tiny_sampler" / "latents.pt", "latents")["heldout"]
    assert len(encoded) == (8 if source is pairs else 2 * 6)  # functions have no mirror images
    assert torch.isfinite(encoded).all()


def test_functions_are_not_prepared(tmp_path):
    config = tiny_config(tmp_path)
    pairs(config, tmp_path)
    path = write_config_file(config, tmp_path / "ae.py")
    line = only_line(run_script("data/prepare.py", "--config", path, "--output", tmp_path / "lmdb"))
    assert "data.name='function' is evaluated at any resolution" in line and not (tmp_path / "lmdb").exists()
