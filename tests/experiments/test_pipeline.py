"""Training, sampling, reconstructing and scoring a tiny model by the scripts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.images import read_image
from diffusion import gaussian_diffusion
from diffusion.schedules import log_snr_timesteps
from tests.data.layouts import write_folder
from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, write_config_file
from utils.checkpoint import load_checkpoint, load_weights_file
from utils.logging import read_metrics

STAGE_1, STAGE_2 = "train_inf_ae_diffusion.py", "train_latent_diffusion.py"
SAMPLES, RECONS = "experiments/generate_samples.py", "experiments/generate_recons.py"
EXPORT, SUPER_RESOLUTION = "experiments/export_weights.py", "experiments/super_resolution.py"


def test_a_run_folder_holds_what_it_should(trained):
    run, sampler = (trained[0] / "checkpoints" / name for name in ("tiny", "tiny_sampler"))
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "checkpoint.pt", "best_checkpoint.pt", "config.json", "metrics.jsonl", "images"}
    assert {path.name for path in sampler.iterdir()} - {".lock"} == {
        "latent_checkpoint.pt", "best_latent_checkpoint.pt", "latents.pt", "config.json", "metrics.jsonl", "images"}
    assert {path.name for path in (run / "images").iterdir()} == {
        "reconstructions_0000004.png", "samples_0000004.png"}
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert [line["step"] for line in lines if "validation_loss" in line] == [4]
    assert all(line["gradient_norm"] > 0 for line in lines if "loss" in line)
    parts = [f"validation_loss_q{i}" for i in range(1, 5)]  # of one image each: their mean is the whole
    for prefix in ("", "raw_"):
        losses = [lines[-1][f"{prefix}{name}"] for name in parts]
        assert len(set(losses)) == 4 and sum(losses) / 4 == pytest.approx(lines[-1][f"{prefix}validation_loss"])
    assert load_checkpoint(run / "best_checkpoint.pt")["value"] == lines[-1]["validation_loss"]
    assert json.loads((run / "config.json").read_text())["model"]["nf"] == 8


@pytest.mark.parametrize("overrides", [
    ["model.stochastic_encoding=True", "model.learn_sigma=True", "mc_integral.type=halton"],
    ["diffusion.multiscale_loss=True", "diffusion.multiscale_max_img_size=8", "model.uno_conv_type=spectral",
     "mc_integral.type=stratified", "diffusion.schedule_sampler=loss-second-moment"],
])
@pytest.mark.slow
def test_stage_1_trains_with_every_option(trained, tmp_path, overrides):
    result = run_script(STAGE_1, *trained[1], f"--config.run.output_dir={tmp_path}", "--config.train.max_steps=2",
                        *(f"--config.{override}" for override in overrides))
    assert result.code == 0, result.err


@pytest.mark.slow
def test_the_progress_bar_counts_sampling_steps(trained):
    for stage, arguments in ((STAGE_1, trained[1]), (STAGE_2, trained[2])):
        overrides = f"--config.run.experiment=pictures_{stage}", "--config.train.max_steps=1"
        assert "sampling images, step 40 of 40" in run_script(stage, *arguments, *overrides).err


def test_latents_cover_the_mirror_images_and_are_standardised(trained):
    folder = trained[0] / "checkpoints"
    latents = load_checkpoint(folder / "tiny_sampler" / "latents.pt", "latents")["train"]
    half = len(latents) // 2
    assert len(latents) % 2 == 0 and not torch.allclose(latents[:half], latents[half:])
    facts = load_checkpoint(folder / "tiny_sampler" / "best_latent_checkpoint.pt", "latent")["facts"]
    torch.testing.assert_close(facts["mean"], latents.mean(0))
    torch.testing.assert_close(facts["std"], latents.std(0).clamp_min(1e-6))


def test_stage_2_draws_all_time_steps_and_normal_noise(trained, monkeypatch):
    real, seen = gaussian_diffusion.GaussianDiffusion.training_losses, []

    def noted(diffusion, model, x0, t, coords, noise):
        if len(x0) == 16:  # not those of validation
            seen.append((t, noise))
        return real(diffusion, model, x0, t, coords, noise)

    monkeypatch.setattr(gaussian_diffusion.GaussianDiffusion, "training_losses", noted)
    options = ["--config.train.batch_size=64", "--config.train.accumulation_steps=4", "--config.train.max_steps=5"]
    result = run_script(STAGE_2, *trained[2], *options, "--config.run.experiment=drawn")
    assert result.code == 0, result.err
    t, noise = (torch.cat(column) for column in zip(*seen, strict=True))
    assert t.shape == (320,) and noise.shape == (320, 6)
    assert len(noise.flatten().unique()) > 1900 and set(t.tolist()) == set(range(20))
    assert noise.mean().abs() < 0.1 and abs(noise.std() - 1) < 0.1 and abs(noise.pow(4).mean() - 3) < 0.6


@pytest.mark.slow
def test_latents_are_encoded_again_only_if_they_are_stale(trained, tmp_path):
    folder, single, both = trained
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(folder / "checkpoints", checkpoints)
    moved = [f"--{name}.run.output_dir={checkpoints}" for name in ("config", "decoder_config")]
    path = checkpoints / "tiny_sampler" / "latents.pt"
    before = path.stat().st_mtime_ns
    run_script(STAGE_2, *both, *moved, "--config.train.max_steps=5")
    assert path.stat().st_mtime_ns == before
    run_script(STAGE_1, *single, moved[0], "--config.train.max_steps=5")  # other weights
    # the latent model of the old encoder is neither sampled with the new encoder nor trained further
    result = run_script(SAMPLES, *both, *moved, "--num_samples=1", "--sampling_steps=3", "--output", tmp_path / "s")
    assert "latents of another encoder" in only_line(result)
    assert "trained on other data" in only_line(run_script(STAGE_2, *both, *moved, "--config.train.max_steps=6"))
    assert path.stat().st_mtime_ns == before
    for checkpoint in checkpoints.glob("tiny_sampler/*checkpoint*.pt"):
        checkpoint.unlink()
    assert run_script(STAGE_2, *both, *moved).code == 0
    assert path.stat().st_mtime_ns != before


def sample(both, output, *more):
    result = run_script(SAMPLES, *both, "--sampling_steps=3", "--output", output, *more)
    assert result.code == 0, result.err
    images = {path.name: read_image(path) for path in sorted(output.glob("*.png"))}
    assert f"{len(images)} images in {output}\n" in result.out
    return images


def test_image_i_depends_on_neither_batch_size_nor_interruptions(trained, tmp_path):
    images = sample(trained[2], tmp_path / "a", "--num_samples=5", "--config.train.sample_size=2")
    assert list(images) == [f"{i:05d}.png" for i in range(5)]
    other = sample(trained[2], tmp_path / "b", "--num_samples=5", "--config.train.sample_size=5")
    for name, image in images.items():
        assert (image.int() - other[name].int()).abs().max() <= 1  # batched products may round differently
    (tmp_path / "a" / "00003.png").unlink()
    kept = (tmp_path / "a" / "00002.png").stat().st_mtime_ns
    again = sample(trained[2], tmp_path / "a", "--num_samples=5", "--config.train.sample_size=2")
    assert (again["00003.png"].int() - images["00003.png"].int()).abs().max() <= 1
    assert (tmp_path / "a" / "00002.png").stat().st_mtime_ns == kept
    assert not torch.equal(images["00000.png"], images["00001.png"])


@pytest.mark.parametrize("size, shape", [("32", (3, 32, 32)), ("24x40", (3, 24, 40)), ("17", (3, 17, 17))])
def test_samples_at_any_size(trained, tmp_path, size, shape):
    images = sample(trained[2], tmp_path / "s", "--num_samples=1", "--sample_img_size", size)
    assert images["00000.png"].shape == shape


@pytest.mark.slow
def test_less_memory_gives_the_same_images(trained, tmp_path):
    """480 points: one image at a time. 250 points: in parts."""
    for size in ("16", "20x24"):
        images = sample(trained[2], tmp_path / size, "--num_samples=3", f"--sample_img_size={size}", "--eta=0.5")
        for points in (480, 250):
            less = sample(trained[2], tmp_path / f"{size} {points}", "--num_samples=3", f"--sample_img_size={size}",
                          "--eta=0.5", f"--max_points={points}", "--config.train.sample_size=3")
            for name, image in images.items():
                assert (image.int() - less[name].int()).abs().max() <= 1


@pytest.mark.slow
def test_a_window_of_a_large_image(trained, tmp_path):
    whole = sample(trained[2], tmp_path / "whole", "--num_samples=2", "--sample_img_size=32x24")
    for words in (["--window", "0", "0.25", "0.5", "0.7"], ["--window=0,0.25,0.5,0.7"]):
        part = sample(trained[2], tmp_path / words[0], *words, "--num_samples=2", "--sample_img_size=32x24")
        for name, image in part.items():
            difference = (image - whole[name][:, 8:23, :12].float()) / whole[name].float().std()
            assert image.shape == (3, 15, 12) and difference.square().mean().sqrt() < 0.1
    result = run_script(SAMPLES, *trained[2], "--sampling_steps=3", "--sample_img_size=32x24", "--output",
                        tmp_path / "whole", "--window", "0", "0", "1", "1")
    assert "holds images made with window=None" in only_line(result)


@pytest.mark.slow
def test_samplers_and_eta(trained, tmp_path, monkeypatch):
    plain = sample(trained[2], tmp_path / "ddim", "--num_samples=1")
    for name, *flags in (("ddpm", "--sampler=ddpm"), ("eta", "--eta=1"),
                         ("latent", "--latent_sampler=ddim", "--latent_sampling_steps=5")):
        other = sample(trained[2], tmp_path / name, "--num_samples=1", *flags)
        assert not torch.equal(plain["00000.png"], other["00000.png"])
    # estimates of an untrained network hardly change between steps, so that dpm_solver differs from DDIM in times only
    chosen = []
    monkeypatch.setattr(gaussian_diffusion, "log_snr_timesteps",
                        lambda betas, count, flag: chosen.append(count) or log_snr_timesteps(betas, count, flag))
    solver = sample(trained[2], tmp_path / "solver", "--num_samples=1", "--sampler=dpm_solver",
                    "--latent_sampler=dpm_solver", "--latent_sampling_steps=5")
    assert solver["00000.png"].shape == (3, 16, 16) and chosen == [3, 5]
    flags = "--num_samples=1", "--sampler=dpm_solver", "--sampling_steps=2"
    for script, *more in ((RECONS,), (SUPER_RESOLUTION, "--input_img_size=16", "--sample_img_size=20")):
        result = run_script(script, *trained[1], *flags, *more, "--output", tmp_path / Path(script).stem)
        assert result.code == 0 and chosen.pop() == 2


@pytest.mark.slow
def test_exported_weights_replace_the_checkpoints_in_every_script(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, single, both = trained
    for config, run, name in ((single[1], "tiny", "weights"), (both[1], "tiny_sampler", "latent_weights")):
        result = run_script(EXPORT, "--config", config, f"--output={tmp_path}/out/{run}/{name}.safetensors")
        assert result.code == 0 and "M parameters of step" in result.out
    moved = [f"--{flag}.run.output_dir={tmp_path / 'out'}" for flag in ("config", "decoder_config")]
    ours, theirs = (sample(both, tmp_path / name, "--num_samples=3", *more) for name, more in (("a", []), ("b", moved)))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert run_script(RECONS, *single, moved[0], "--sampling_steps=2", "--output", tmp_path / "r").code == 0
    assert run_script(STAGE_2, *both, *moved, "--config.run.experiment=again").code == 0
    images = [*single, moved[0], "--sampling_steps=2", "--num_samples=1"]
    latent_config = ["--latent_config", both[1], f"--latent_config.run.output_dir={tmp_path / 'out'}"]
    for script, *flags in (
        ("inpaint", *images, *latent_config), ("super_resolution", *images, "--sample_img_size=20"),
        ("interpolate", *single, moved[0], "--sampling_steps=2", "--frames=2", "--num_pairs=1", *latent_config),
        ("calculate_fid", *both, *moved, "--sampling_steps=2", "--num_samples=4", "--split=all", "--neighbours=2",
         "--feature_model=efficientnet_lite0"),
        ("report", *both, *moved),
    ):
        result = run_script(f"experiments/{script}.py", *flags)
        assert result.code == 0, result.err
    # a contradicting flag, and a file of the other stage
    result = run_script(RECONS, *single, moved[0], "--sampling_steps=2", "--config.model.nf=16")
    assert "weights.safetensors was trained with model.nf=8, the config has 16" in only_line(result)
    shutil.copy(tmp_path / "out" / "tiny_sampler" / "latent_weights.safetensors",
                tmp_path / "out" / "tiny" / "weights.safetensors")
    assert "holds a latent, not a autoencoder" in only_line(
        run_script(RECONS, *single, moved[0], "--sampling_steps=2"))


@pytest.mark.slow
def test_the_best_or_newest_checkpoint_is_exported(trained, tmp_path):
    for config, run, name in ((trained[1][1], "tiny", "checkpoint.pt"),
                              (trained[2][1], "tiny_sampler", "latent_checkpoint.pt")):
        for which, prefix in (("best", "best_"), ("newest", "")):
            path = tmp_path / "w.safetensors"
            assert run_script(EXPORT, "--config", config, "--which", which, "--output", path).code == 0
            saved = load_checkpoint(trained[0] / "checkpoints" / run / f"{prefix}{name}")
            exported = load_weights_file(path, saved["kind"])
            assert all(torch.equal(value, exported["ema"][name]) for name, value in saved["ema"].items())
    assert "must end with .safetensors" in only_line(run_script(EXPORT, "--config", config, "--output=w.pt"))


@pytest.mark.slow
def test_the_previous_checkpoint_replaces_a_damaged_one(trained, tmp_path):
    folder, single, _ = trained
    run = tmp_path / "checkpoints" / "tiny"
    shutil.copytree(folder / "checkpoints" / "tiny", run)
    again = [*single, f"--config.run.output_dir={tmp_path / 'checkpoints'}"]
    assert run_script(STAGE_1, *again, "--config.train.max_steps=6").code == 0
    content = bytearray((run / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "checkpoint.pt").write_bytes(content)
    for script, *flags in ((RECONS, "--sampling_steps=2", "--output", tmp_path / "r"), (EXPORT,),
                           (STAGE_1, "--config.train.max_steps=5")):
        result = run_script(script, *again, *flags)
        assert result.code == 0, result.err
    assert load_checkpoint(run / "checkpoint.pt")["step"] == 5
    (run / "checkpoint.pt").unlink()
    assert run_script(RECONS, *again, "--sampling_steps=2", "--output", tmp_path / "s").code == 0


def test_images_with_other_settings_are_not_mixed(trained, tmp_path):
    sample(trained[2], tmp_path / "a", "--num_samples=1")
    for flag, named in (("--sampling_steps=4", "steps=3, not 4"), ("--sample_img_size=32", "size=[16, 16]"),
                        ("--config.run.seed=7", "seed=0, not 7")):
        result = run_script(SAMPLES, *trained[2], "--sampling_steps=3", "--num_samples=1",
                            "--output", tmp_path / "a", flag)
        assert named in only_line(result)


def test_reconstructions_and_how_close_they_are(trained, tmp_path):
    command = RECONS, *trained[1], "--num_samples=5", "--sampling_steps=3"
    result = run_script(*command, "--output", tmp_path / "r")
    assert result.code == 0 and "mollified PSNR" in result.out
    assert run_script(*command, "--output", tmp_path / "p", "--max_points=200").code == 0  # encoded in parts as well
    whole, parts = (read_image(tmp_path / name / "reconstructions" / "00002.png").int() for name in ("r", "p"))
    assert (whole - parts).abs().max() <= 1
    assert "--max_points=8 is" in only_line(run_script(*command, "--output", tmp_path / "q", "--max_points=8"))
    assert len(list((tmp_path / "r" / "originals").glob("*.png"))) == 4  # all that are held out
    assert Image.open(tmp_path / "r" / "reconstructions" / "00003.png").size == (16, 16)
    assert json.loads((tmp_path / "r" / "scores.json").read_text())["count"] == 4


@pytest.mark.slow
def test_calculate_fid_samples_a_trained_pair_as_generate_samples_does(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["experiments/calculate_fid.py", *trained[2], "--split=all", "--feature_model=efficientnet_lite0",
               "--num_samples=5", "--sampling_steps=3"]
    first = run_script(*command, "--output=scores.json")
    assert first.code == 0 and "5 samples of 16x16 by ddim in 3 steps" in first.out, first.err
    folder = tmp_path / "samples" / "tiny_sampler_16x16"
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(made) == 5 and json.loads((tmp_path / "scores.json").read_text())["samples"] == str(
        folder.relative_to(tmp_path))
    assert run_script(*command).out == first.out  # from the images that are there
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")} == made
    scored = run_script("experiments/calculate_fid.py", *trained[1], "--split=all", "--samples", folder,
                        "--feature_model=efficientnet_lite0")
    assert scored.out == first.out
    again = sample(trained[2], folder, "--num_samples=6")  # and sampling goes on where scoring left off
    assert len(again) == 6 and (folder / "00000.png").stat().st_mtime_ns == made["00000.png"]
    for flags, named in ((["--eta=1", "--sampler=ddpm"], "--eta=1.0 applies to"),
                         (["--num_samples=3"], "3 samples are too"),
                         (["--sample_img_size=8"], "--sample_img_size=8 must be")):
        assert named in only_line(run_script(*command, *flags))


def test_noise_images_have_the_moments_of_the_data(trained, tmp_path):
    run_script(RECONS, *trained[1], "--sampling_steps=1", "--output", tmp_path / "r")
    assert run_script("experiments/generate_noise.py", *trained[1], "--output", tmp_path / "noise").code == 0
    data, noise = (torch.stack([read_image(path) for path in sorted(folder.glob("*.png"))]).float()
                   for folder in (tmp_path / "r" / "originals", tmp_path / "noise"))
    assert data.shape == noise.shape and not torch.equal(data, noise)
    torch.testing.assert_close(noise.mean((0, 2, 3)), data.mean((0, 2, 3)), atol=6, rtol=0)  # it is clipped to 8 bits
    torch.testing.assert_close(noise.std((0, 2, 3)), data.std((0, 2, 3)), atol=6, rtol=0)


def test_dropout_is_off_when_sampling(trained, tmp_path, monkeypatch):
    from torch.nn import functional
    calls = []
    original = functional.dropout
    monkeypatch.setattr(functional, "dropout", lambda x, p=0.5, training=True, inplace=False: (
        calls.append(training), original(x, p, training, inplace))[1])
    sample(trained[2], tmp_path / "s", "--num_samples=1")
    assert calls and not any(calls)


@pytest.mark.slow
def test_wandb_offline_keeps_metrics_and_images(tmp_path):
    write_folder(tmp_path / "data", 80)
    path = write_config_file(tiny_config(tmp_path, tmp_path / "data", "folder"), tmp_path / "ae.py")
    result = run_script(STAGE_1, "--config", path, "--config.run.wandb_mode=offline",
                        f"--config.run.wandb_dir={tmp_path}")
    assert result.code == 0, result.err
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1 and list(runs[0].glob("**/*.png"))
