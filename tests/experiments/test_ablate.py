"""ablate.py: variants train in their own processes, are scored once, and end up in one table."""

import csv
import json
import sys

import pytest
from PIL import Image

from diffusion import gaussian_diffusion
from diffusion.schedules import log_snr_timesteps
from experiments.lib import ablation_runs
from tests.data.layouts import write_folder
from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, write_config_file
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.logging import read_metrics

ABLATE, FEATURES = "experiments/ablate.py", "--feature_model=efficientnet_lite0"


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """(folder, command, result) of an ablation of the encoder. The variant without one was interrupted at step 4."""
    folder = tmp_path_factory.mktemp("ablated")
    write_folder(folder / "data", 160)  # of which 8 are held out
    config = write_config_file(tiny_config(folder / "elsewhere", folder / "data", "folder"), folder / "config.py")
    before = run_script("train_inf_ae_diffusion.py", "--config", config, f"--config.run.output_dir={folder / 'out'}",
                        "--config.run.experiment=encoder/none", "--config.model.z_dim=0", "--config.train.max_steps=4",
                        "--config.train.plot_graph_steps=1", "--config.train.ema_decay=0.5")
    assert before.code == 0, before.err
    command = [ABLATE, "--config", config, "--config.train.ema_decay", 0.5, "--axes=encoder", "--steps=12",
               "--num_samples=8", "--sampler=dpm_solver", "--sampling_steps=2", FEATURES, "--output", folder / "out"]
    chosen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian_diffusion, "log_snr_timesteps",
                      lambda betas, count, flag: chosen.append(count) or log_snr_timesteps(betas, count, flag))
        result = run_script(*command)
    assert set(chosen) == {2}
    return folder / "out", command, result


@pytest.mark.slow
def test_every_variant_has_a_row_in_every_form(ablated):
    out, _, result = ablated
    assert result.code == 0 and "results.md" in result.out, result.err
    rows = json.loads((out / "results.json").read_text())
    assert [(row["axis"], row["variant"], row["changes"]) for row in rows] == [
        ("encoder", "encoder", ""), ("encoder", "none", "model.z_dim=0")]
    assert all(row["steps"] == 12 and row["num_decoded"] == 8 and 0 < row["denoising_error"] < 4 for row in rows)
    assert all(row["peak_memory_gb"] > 0.1 and row["seconds_per_step"] > 0 for row in rows)
    assert rows[0]["psnr"] > 0 and rows[1]["psnr"] is None and rows[1]["parameters"] < rows[0]["parameters"] / 1.3
    with open(out / "results.csv", newline="") as file:
        assert [float(row["kid"]) for row in csv.DictReader(file)] == [row["kid"] for row in rows]
    lines = (out / "results.md").read_text().splitlines()
    assert len(lines) == 4 and "| none |" in lines[3] and "| – |" in lines[3]
    assert Image.open(out / "results.png").width > 800


@pytest.mark.slow
def test_an_interrupted_variant_resumes_and_fields_of_the_command_apply_to_all(ablated):
    out, _, _ = ablated
    steps = [line["step"] for line in read_metrics(out / "encoder" / "none" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 13))
    for experiment in ("base", "encoder/none"):
        saved = load_checkpoint(out / experiment / "checkpoint.pt")
        assert saved["step"] == 12 and saved["config"]["train"]["ema_decay"] == 0.5


@pytest.mark.slow
def test_a_variant_with_a_result_is_not_run_again(ablated, monkeypatch):
    out, command, _ = ablated
    before = {path: path.stat().st_mtime_ns for path in out.glob("**/*.pt")}
    monkeypatch.setattr(ablation_runs.subprocess, "Popen", lambda *_, **__: pytest.fail("trained again"))
    assert run_script(*command).code == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("**/*.pt")} == before


@pytest.mark.slow
def test_other_settings_are_not_mixed_into_a_folder(ablated):
    for other, name in (("--steps=13", "steps"), ("--sampling_steps=3", "sampling_steps"),
                        ("--config.model.nf=4", "config")):
        assert f"holds results with another {name};" in only_line(run_script(*ablated[1], other))


@pytest.mark.slow
def test_a_model_without_an_encoder_is_sampled_and_scored_by_its_config_alone(ablated, tmp_path, monkeypatch):
    out, command, _ = ablated
    monkeypatch.chdir(tmp_path)
    own = [*command[1:3], f"--config.run.output_dir={out}", "--config.run.experiment=encoder/none",
           "--config.model.z_dim=0"]
    sampling = [*own, "--num_samples=4", "--sampling_steps=2"]
    assert run_script("experiments/generate_samples.py", *sampling).code == 0
    assert len(list((tmp_path / "samples" / "encoder" / "none_16x16").glob("*.png"))) == 4
    scored = run_script("experiments/calculate_fid.py", *sampling, "--split=heldout", FEATURES)
    assert scored.code == 0 and "4 samples of 16x16 by ddim in 2 steps" in scored.out, scored.err
    assert "reconstructs nothing" in only_line(run_script("experiments/generate_recons.py", *own))
    with_encoder = [*command[1:3], f"--config.run.output_dir={out}", "--config.run.experiment=base"]
    assert "sampled with a latent model" in only_line(run_script("experiments/generate_samples.py", *with_encoder))


def test_minutes_are_converted_to_steps_once(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    calls = []

    def train(variant_config, changes, arguments, steps, experiment=None):
        calls.append(experiment)
        folder = tmp_path / experiment
        folder.mkdir(parents=True)
        lines = [{"step": step, "seconds": 5 + 0.25 * step} for step in range(10, steps + 1, 10)]  # 5 s to start
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return True

    monkeypatch.setattr(ablation_runs, "train", train)
    assert [ablation_runs.steps_in(2.0, config, {}, []) for _ in range(2)] == [480, 480]
    assert calls == ["tiny.calibration"] and not (tmp_path / "tiny.calibration").exists()


def test_variants_are_checked_before_any_is_trained(tmp_path):
    impossible = ablation_runs.make_variant(
        "kind", "v", {"diffusion.model_mean_type": "v", "diffusion.precondition": True})
    with pytest.raises(UserError, match="precondition"):
        impossible.config(tiny_config(tmp_path), tmp_path)
    unknown = ablation_runs.make_variant("kind", "v 2", {"mc_integral.type": "grid"})
    assert unknown.experiment == "kind/v_2"
    with pytest.raises(UserError, match="kind, v 2: config.mc_integral.type='grid' must be one of"):
        unknown.config(tiny_config(tmp_path), tmp_path)


def test_mistakes_are_one_line(tmp_path):
    config = write_config_file(tiny_config(tmp_path), tmp_path / "config.py")
    for flags, message in (([], "either as --steps or as --minutes"), (["--steps=20", "--minutes=1"], "either as"),
                           (["--steps=20", "--axes=depth"], "--axes=depth is unknown; choose from encoder,grid"),
                           (["--steps=20", "--config.model.nf=0"], "model.nf=0 must be at least 1")):
        assert message in only_line(run_script(ABLATE, "--config", config, "--output", tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


def test_a_variant_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    config = write_config_file(tiny_config(tmp_path), tmp_path / "config.py")
    monkeypatch.setattr(sys, "executable", "false")
    result = run_script(ABLATE, "--config", config, "--output", tmp_path / "out", "--steps=20", "--axes=grid",
                        "--sampling_steps=2", FEATURES)
    assert result.code == 1 and "training failed for grid, conv; grid, spectral; the same command" in result.err
