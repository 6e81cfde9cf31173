"""Flows and models that jump, by the scripts that train, sample and score any model."""

import json

import pytest
import torch

from data.images import read_image
from tests.data.layouts import write_folder
from tests.scripts import only_line, run_script, torchrun
from tests.tiny import tiny_config, tiny_latent_config, write_config_file
from utils.checkpoint import load_checkpoint

STAGE_1, STAGE_2 = "train_inf_ae_diffusion.py", "train_latent_diffusion.py"
FEATURES = ["--feature_model=efficientnet_lite0"]
SAMPLES, RECONS = "experiments/generate_samples.py", "experiments/generate_recons.py"


@pytest.fixture(scope="module", params=["flow", "few_step"])
def trained(request, tmp_path_factory):
    """(objective, folder, arguments of the autoencoder config, arguments of both configs)."""
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder / "data", 80)
    runs = folder / "checkpoints"
    configs = [tiny_config(runs, folder / "data", "folder"), tiny_latent_config(runs)]
    for config in configs:
        config.diffusion.objective, config.diffusion.loss_type = request.param, "mse"
    ae, latent = (write_config_file(config, folder / name)
                  for config, name in zip(configs, ("ae.py", "latent.py"), strict=True))
    single, both = ["--config", ae], ["--config", latent, "--decoder_config", ae]
    assert run_script(STAGE_1, *single).code == 0
    assert run_script(STAGE_2, *both).code == 0
    return request.param, folder, single, both


def weights(folder, experiment, filename):
    return load_checkpoint(folder / experiment / filename)["modules"]


def test_the_second_embedding_is_trained_in_both_stages(trained):
    objective, folder, *_ = trained
    for experiment, filename in (("tiny", "checkpoint.pt"), ("tiny_sampler", "latent_checkpoint.pt")):
        found = {name: value for name, value in weights(folder / "checkpoints", experiment, filename).items()
                 if ".time.jump." in name}
        assert len(found) == (4 if objective == "few_step" else 0)
        assert all(value.abs().max() > 0 for value in found.values())


def test_a_run_that_was_interrupted_ends_with_the_same_weights(trained, tmp_path):
    """alpha and the times of the jumps are functions of the step."""
    _, folder, single, both = trained
    output = [f"--config.run.output_dir={tmp_path}", f"--decoder_config.run.output_dir={folder / 'checkpoints'}"]
    for script, arguments, experiment, filename in (
            (STAGE_1, [*single, output[0]], "tiny", "checkpoint.pt"),
            (STAGE_2, [*both, *output], "tiny_sampler", "latent_checkpoint.pt")):
        for stop in ("--config.train.checkpoint_steps=3", ""):
            assert run_script(script, *arguments, *filter(None, [stop])).code == 0
            if stop:
                (tmp_path / experiment / filename).unlink()  # what is left is the checkpoint of step 3
        ours, whole = weights(tmp_path, experiment, filename), weights(folder / "checkpoints", experiment, filename)
        assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_samples_by_default_and_by_every_solver(trained, tmp_path):
    objective, _, _, both = trained
    default = ("heun", 20) if objective == "flow" else ("jump", 4)
    for name, flags, made in (
            ("default", [], default), ("euler", ["--sampler=euler", "--sampling_steps=3"], ("euler", 3)),
            ("heun", ["--sampler=heun", "--sampling_steps=4", "--sample_img_size=20x28"], ("heun", 4)),
            ("latents", ["--latent_sampler=euler", "--latent_sampling_steps=3"], default)):
        assert run_script(SAMPLES, *both, "--num_samples=2", "--output", tmp_path / name, *flags).code == 0
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        assert (settings["sampler"], settings["steps"]) == made
        assert read_image(tmp_path / name / "00000.png").shape == ((3, 20, 28) if name == "heun" else (3, 16, 16))
    assert (settings["latent_sampler"], settings["latent_steps"]) == ("euler", 3)


def test_samplers_of_other_objectives_are_refused(trained, tmp_path):
    objective, _, _, both = trained
    for flags in (["--sampler=ddim"], ["--latent_sampler=ddpm"], ["--sampler=jump"], ["--eta=0.5"]):
        if flags == ["--sampler=jump"] and objective == "few_step":
            continue
        line = only_line(run_script(SAMPLES, *both, "--num_samples=2", "--output", tmp_path / "a", *flags))
        assert flags[0][:-1] in line and ("heun" in line or "jump" in line)


@pytest.mark.slow
def test_two_processes_train_as_one(trained, tmp_path):
    objective, folder, single, _ = trained
    if objective == "flow":
        pytest.skip("the times of jumps are those of few_step")
    assert torchrun(STAGE_1, *single, f"--config.run.output_dir={tmp_path}").code == 0
    ours, whole = (weights(runs, "tiny", "checkpoint.pt") for runs in (tmp_path, folder / "checkpoints"))
    for name in whole:
        torch.testing.assert_close(ours[name], whole[name], rtol=0, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [
    ("experiments/calculate_fid.py", [*FEATURES, "--split=heldout", "--num_samples=4", "--neighbours=2"]),
    ("experiments/report.py", []),
    ("experiments/ablate.py", [*FEATURES, "--axes=kernel", "--steps=10", "--num_samples=4", "--sampling_steps=2"])])
def test_scores_report_and_ablations_take_the_model(trained, tmp_path, monkeypatch, script, flags):
    objective, _, single, both = trained
    if "ablate" in script and objective == "flow":
        pytest.skip("the longest one, for one objective")
    monkeypatch.chdir(tmp_path)
    result = run_script(script, *(single if "ablate" in script else both), *flags, "--output", tmp_path / "out.html")
    assert result.code == 0, result.err
    if "ablate" in script:
        rows = json.loads((tmp_path / "out.html" / "results.json").read_text())
        assert [row["variant"] for row in rows] == ["depthwise", "full"] and all(row["psnr"] > 0 for row in rows)
    else:
        assert (tmp_path / "out.html").stat().st_size > 100


@pytest.mark.parametrize("script, flags", [
    (RECONS, []), (SAMPLES, ["--window", "0.1 0.2 0.6 0.9"]), (SAMPLES, ["--max_points=500"]),
    ("experiments/super_resolution.py", ["--input_img_size=16", "--sample_img_size=20"]),
    ("experiments/inpaint.py", ["--mask=centre", "--sampling_steps=5"]),
    ("experiments/interpolate.py", ["--sampling_steps=5", "--frames=3", "--directions=1", "--num_pairs=1"]),
    ("experiments/export_weights.py", [])])
def test_every_application_takes_the_model(trained, tmp_path, script, flags):
    _, folder, single, both = trained
    if script != "experiments/export_weights.py":
        flags = [*flags, "--output", tmp_path / "out"]
    if script not in ("experiments/export_weights.py", "experiments/interpolate.py"):
        flags.append("--num_samples=2")
    result = run_script(script, *(both if script == SAMPLES else single), *flags)
    assert result.code == 0, result.err


@pytest.mark.parametrize("field, value", [
    ("diffusion.loss_type", "l1"), ("diffusion.precondition", True), ("model.learn_sigma", True)])
def test_options_of_ddpm_are_refused(trained, field, value):
    line = only_line(run_script(STAGE_1, *trained[2], f"--config.{field}={value}"))
    assert field in line and trained[0] in line
