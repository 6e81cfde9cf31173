"""Both stages, sampling, reconstructions, scoring and the report, end to end on a tiny model, as a user runs them."""

import json
import shutil

import pytest
import torch
from PIL import Image

from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file
from utils.checkpoint import load_checkpoint
from utils.images import read_image
from utils.logging import read_metrics

STAGE_1, STAGE_2 = "train_inf_ae_diffusion.py", "train_latent_diffusion.py"
SAMPLES, RECONS = "experiments/generate_samples.py", "experiments/generate_recons.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, arguments of the autoencoder config, arguments of both configs) of a trained pair of models."""
    folder = tmp_path_factory.mktemp("trained")
    ae = write_config_file(tiny_config(folder / "checkpoints"), folder / "ae.py")
    latent = write_config_file(tiny_latent_config(folder / "checkpoints"), folder / "latent.py")
    single, both = ["--config", ae], ["--config", latent, "--decoder_config", ae]
    assert run_script(STAGE_1, *single).code == 0
    assert run_script(STAGE_2, *both).code == 0
    return folder, single, both


def test_a_run_folder_holds_what_it_should(trained):
    run, sampler = (trained[0] / "checkpoints" / name for name in ("tiny", "tiny_sampler"))
    assert {path.name for path in run.iterdir()} == {"checkpoint.pt", "config.json", "metrics.jsonl", "images"}
    assert {path.name for path in sampler.iterdir()} == {
        "latent_checkpoint.pt", "best_latent_checkpoint.pt", "latents.pt", "config.json", "metrics.jsonl", "images"}
    assert {path.name for path in (run / "images").iterdir()} == {
        "reconstructions_0000004.png", "samples_0000004.png"}
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert [line["step"] for line in lines if "validation_loss" in line] == [4]
    assert json.loads((run / "config.json").read_text())["model"]["nf"] == 8


@pytest.mark.parametrize("overrides", [
    ["--config.diffusion.schedule_sampler=loss-second-moment"],
    ["--config.model.stochastic_encoding", "--config.model.learn_sigma", "--config.mc_integral.type=halton"],
    ["--config.diffusion.multiscale_loss", "--config.diffusion.multiscale_max_img_size=8",
     "--config.model.uno_conv_type=spectral", "--config.mc_integral.type=stratified"],
])
def test_stage_1_stopped_and_started_again_equals_an_unbroken_run(tmp_path, overrides):
    config = write_config_file(tiny_config(tmp_path), tmp_path / "ae.py")
    command = [STAGE_1, "--config", config, *overrides]
    assert run_script(*command, "--config.run.experiment=whole").code == 0
    for steps in (3, 4):
        assert run_script(*command, "--config.run.experiment=parts", f"--config.train.max_steps={steps}").code == 0
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    for group in ("modules", "ema"):
        assert whole[group].keys() == parts[group].keys()
        assert all(torch.equal(value, parts[group][name]) for name, value in whole[group].items())
    assert whole["sums"] == parts["sums"]


def test_the_same_seed_gives_the_same_losses_and_another_does_not(tmp_path):
    config = write_config_file(tiny_config(tmp_path), tmp_path / "ae.py")

    def losses(name, seed):
        run_script(STAGE_1, "--config", config, f"--config.run.experiment={name}", f"--config.run.seed={seed}")
        return [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]

    first, again, other = losses("a", 0), losses("b", 0), losses("c", 1)
    assert first == again and len(first) == 2 and first != other


def test_stage_2_stopped_and_started_again_equals_an_unbroken_run(trained):
    folder, _, both = trained
    for name, steps in (("whole", 4), ("parts", 3), ("parts", 4)):
        overrides = f"--config.run.experiment={name}", f"--config.train.max_steps={steps}"
        assert run_script(STAGE_2, *both, *overrides).code == 0
    whole, parts = (load_checkpoint(folder / "checkpoints" / name / "latent_checkpoint.pt")
                    for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["ema"][name]) for name, value in whole["ema"].items())


def test_latents_cover_the_mirror_images_and_are_standardised(trained):
    folder = trained[0] / "checkpoints"
    latents = load_checkpoint(folder / "tiny_sampler" / "latents.pt", "latents")["train"]
    half = len(latents) // 2
    assert len(latents) % 2 == 0 and not torch.allclose(latents[:half], latents[half:])
    facts = load_checkpoint(folder / "tiny_sampler" / "best_latent_checkpoint.pt", "latent")["facts"]
    torch.testing.assert_close(facts["mean"], latents.mean(0))
    torch.testing.assert_close(facts["std"], latents.std(0).clamp_min(1e-6))


def test_stale_latents_are_encoded_again_and_fresh_ones_are_not(trained, tmp_path):
    folder, single, both = trained
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(folder / "checkpoints", checkpoints)
    moved = [f"--{name}.run.output_dir={checkpoints}" for name in ("config", "decoder_config")]
    path = checkpoints / "tiny_sampler" / "latents.pt"
    before = path.stat().st_mtime_ns
    run_script(STAGE_2, *both, *moved, "--config.train.max_steps=5")
    assert path.stat().st_mtime_ns == before
    run_script(STAGE_1, *single, moved[0], "--config.train.max_steps=5")  # other weights
    run_script(STAGE_2, *both, *moved, "--config.train.max_steps=6")
    assert path.stat().st_mtime_ns != before


def sample(both, output, *more):
    result = run_script(SAMPLES, *both, "--sampling_steps=3", "--output", output, *more)
    assert result.code == 0, result.err
    return {path.name: read_image(path) for path in sorted(output.glob("*.png"))}


def test_image_i_does_not_depend_on_the_batch_or_on_interruptions(trained, tmp_path):
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


@pytest.mark.parametrize("sampler", ["ddpm", "dpm_solver"])
def test_samplers_and_eta(trained, tmp_path, sampler):
    plain = sample(trained[2], tmp_path / "ddim", "--num_samples=1")
    other = sample(trained[2], tmp_path / sampler, "--num_samples=1", f"--sampler={sampler}")
    noisy = sample(trained[2], tmp_path / "eta", "--num_samples=1", "--eta=1")
    latent = sample(trained[2], tmp_path / "z", "--num_samples=1", "--latent_sampler=ddim", "--latent_sampling_steps=5")
    for images in (other, noisy, latent):
        assert not torch.equal(plain["00000.png"], images["00000.png"])


def test_other_settings_do_not_mix_with_the_images_of_a_folder(trained, tmp_path):
    sample(trained[2], tmp_path / "a", "--num_samples=1")
    for flag, named in (("--sampling_steps=4", "steps=3, not 4"), ("--sample_img_size=32", "size=[16, 16]"),
                        ("--config.run.seed=7", "seed=0, not 7")):
        result = run_script(SAMPLES, *trained[2], "--sampling_steps=3", "--num_samples=1",
                            "--output", tmp_path / "a", flag)
        assert named in only_line(result)


@pytest.mark.parametrize("flags, named", [
    (["--sample_img_size=12"], "--sample_img_size=12"), (["--sample_img_size=big"], "--sample_img_size=big"),
    (["--sampling_steps=0"], "sampling_steps"), (["--sampling_steps=21"], "--sampling_steps=21"),
    (["--sampler=euler"], "sampler"), (["--num_samples=0"], "num_samples"), (["--eta=-1"], "eta"),
    (["--config.model.z_dim=7"], "config.model.z_dim=7 differs from decoder_config.model.z_dim=6"),
    (["--decoder_config.model.nf=16"], "model.nf=8, the config has 16"),
    (["--decoder_config.run.experiment=absent"], "there is no checkpoint"),
    (["--config.run.experiment=absent"], "there is no checkpoint"),
    (["--decoder_config.run.experiment=tiny_sampler"], "there is no checkpoint"),
    (["--output=/proc/none"], "--output=/proc/none"),
])
def test_mistakes_in_sampling_are_one_line(trained, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    assert named in only_line(run_script(SAMPLES, *trained[2], "--num_samples=1", *flags))
    assert not list(tmp_path.iterdir())


def test_a_broken_checkpoint_is_one_line(trained, tmp_path):
    run = tmp_path / "checkpoints" / "tiny"
    run.mkdir(parents=True)
    content = (trained[0] / "checkpoints" / "tiny" / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(content[:len(content) // 2])
    for script in (STAGE_1, RECONS):
        result = run_script(script, *trained[1], f"--config.run.output_dir={tmp_path / 'checkpoints'}")
        assert "not a readable checkpoint" in only_line(result)
    assert (run / "checkpoint.pt").stat().st_size == len(content) // 2


def test_reconstructions_and_how_close_they_are(trained, tmp_path):
    result = run_script(RECONS, *trained[1], "--num_samples=5", "--sampling_steps=3", "--output", tmp_path / "r")
    assert result.code == 0 and "mollified PSNR" in result.out
    assert len(list((tmp_path / "r" / "originals").glob("*.png"))) == 5
    assert Image.open(tmp_path / "r" / "reconstructions" / "00004.png").size == (16, 16)
    assert json.loads((tmp_path / "r" / "scores.json").read_text())["count"] == 5


def test_perfect_reconstructions_are_their_own_nearest():
    from diffusion.mollifier import GaussianMollifier
    from experiments.generate_recons import compare
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mollifier = GaussianMollifier(1.0, 16)
    noisy = images + 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    scores = compare(images, noisy, mollifier)
    assert scores["nearest_is_own"] == 6
    assert scores["mollified_psnr"] == pytest.approx(10 * torch.log10(
        4 / mollifier.blur(noisy - images).square().mean((1, 2, 3))).mean().item(), rel=1e-3)
    assert compare(images, images.roll(1, 0), mollifier)["nearest_is_own"] == 0


def test_dropout_is_off_when_sampling(trained, tmp_path, monkeypatch):
    from torch.nn import functional
    calls = []
    original = functional.dropout
    monkeypatch.setattr(functional, "dropout", lambda x, p=0.5, training=True, inplace=False: (
        calls.append(training), original(x, p, training, inplace))[1])
    sample(trained[2], tmp_path / "s", "--num_samples=1")
    assert calls and not any(calls)
