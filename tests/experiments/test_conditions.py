"""Models that follow classes or vectors, by the scripts: training, sampling, applications, scores, mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import build_dataset
from data.images import read_image
from experiments.lib.image_folders import SampleFolder
from experiments.metrics.classes import by_class, named_by_colour
from tests.data.layouts import config, picture
from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file
from utils.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

SAMPLES, STAGE_1, STAGE_2 = "experiments/generate_samples.py", "train_inf_ae_diffusion.py", "train_latent_diffusion.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, {kind: arguments of both configs}): models that follow classes or vectors, trained for a few steps."""
    folder, commands = tmp_path_factory.mktemp("runs"), {}
    for name, count in (("cats", 42), ("dogs", 41)):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(count):
            picture(i + 100 * len(commands)).save(folder / "data" / name / f"{i:02d}.png")
    np.savez(folder / "data" / "conditions.npz", **{
        str(path.relative_to(folder / "data")): np.array([i, -i, 1]) for i, path in
        enumerate(sorted((folder / "data").glob("*/*.png")))})
    for kind in ("class", "vector"):
        first, latent = tiny_config(folder / kind, folder / "data", "folder"), tiny_latent_config(folder / kind)
        first.data.condition, first.optimizer.learning_rate, latent.optimizer.learning_rate = kind, 0.1, 0.1
        single = ["--config", write_config_file(first, folder / f"{kind}_ae.py")]
        commands[kind] = ["--config", write_config_file(latent, folder / f"{kind}_latent.py"),
                          "--decoder_config", single[1]]
        assert run_script(STAGE_1, *single).code == 0
        assert run_script(STAGE_2, *commands[kind]).code == 0
    return folder, commands


def sample(command, output, *more, count=4):
    result = run_script(SAMPLES, *command, f"--num_samples={count}", "--sampling_steps=3", "--latent_sampling_steps=3",
                        "--output", output, *more)
    assert result.code == 0, result.err
    return torch.stack([read_image(output / f"{i:05d}.png") for i in range(count)]).float()


def test_checkpoints_record_what_they_were_trained_on(runs):
    folder = runs[0]
    saved = load_checkpoint(folder / "class/tiny/checkpoint.pt")["facts"]["conditions"]
    assert saved == ["class", 2, ["cats", "dogs"], [], []]
    latents = load_checkpoint(folder / "class/tiny_sampler/latents.pt")
    assert latents["heldout condition"].tolist() == 2 * [0, 1, 0, 1]  # of the mirror images, too
    assert latents["train condition"].sum() == 2 * 39 and len(latents["train condition"]) == len(latents["train"])
    kind, size, _, mean, std = load_checkpoint(folder / "vector/tiny/checkpoint.pt")["facts"]["conditions"]
    assert (kind, size, len(mean), std[2]) == ("vector", 3, 3, 1.0)


def test_samples_follow_the_flag(runs, tmp_path):
    folder, commands = runs
    cats, dogs, index, data, free = (sample(commands["class"], tmp_path / name, f"--condition={name}")
                                     for name in ("cats", "dogs", "1", "data", "none"))
    assert torch.equal(dogs, index) and not torch.equal(cats, dogs) and not torch.equal(free, cats)
    assert torch.equal(data[::2], cats[::2]) and torch.equal(data[1::2], dogs[1::2])  # those held out, in turn
    assert torch.equal(sample(commands["class"], tmp_path / "default"), data)
    guided = sample(commands["class"], tmp_path / "guided", "--condition=dogs", "--guidance_scale=3")
    part = sample(commands["class"], tmp_path / "part", "--condition=dogs", "--guidance_scale=3",
                  "--guidance_interval=0.5,1", "--sample_img_size=24x16", "--window=0 0 0.5 1")
    assert not torch.equal(guided, dogs) and part.shape == (4, 3, 24, 8)
    settings = json.loads((tmp_path / "data" / "settings.json").read_text())
    assert settings["condition"] == "data" and settings["classes"] == ["cats", "dogs"] * 2
    result = run_script(SAMPLES, *commands["class"], "--sampling_steps=3", "--condition=cats", "--num_samples=5",
                        "--latent_sampling_steps=3", "--output", tmp_path / "dogs")
    assert "made with condition='dogs', not 'cats'" in only_line(result)
    np.save(tmp_path / "v.npy", [[1, -1, 1], [80, -80, 1]])
    vectors = sample(commands["vector"], tmp_path / "vectors", f"--condition={tmp_path / 'v.npy'}")
    np.save(tmp_path / "v.npy", [80, -80, 1])
    far = sample(commands["vector"], tmp_path / "far", f"--condition={tmp_path / 'v.npy'}")
    assert torch.equal(vectors[1::2], far[1::2]) and not torch.equal(vectors[0], far[0])


@pytest.mark.parametrize("script, more", [
    ("generate_recons", ["--num_samples=2"]),
    pytest.param("inpaint", ["--num_samples=2"], marks=pytest.mark.slow),
    pytest.param("super_resolution", ["--num_samples=2", "--input_img_size=16",
                                     "--sample_img_size=20"], marks=pytest.mark.slow),
    pytest.param("interpolate", ["--num_pairs=1", "--frames=2", "--directions=0", "--encodings=8"],
                 marks=pytest.mark.slow),
    pytest.param("inverse_problem", ["--num_samples=2", "--num_posterior_samples=2"], marks=pytest.mark.slow),
])
def test_applications_take_the_condition_of_each_image(runs, tmp_path, script, more):
    """Image 0 is held out of the cats, image 1 of the dogs; a condition that is given replaces theirs."""
    images = {}
    for condition in (None, "data", "cats", "none"):
        output = tmp_path / str(condition)
        result = run_script(f"experiments/{script}.py", "--config", runs[1]["class"][3], "--sampling_steps=3", *more,
                            "--output", output, *([f"--condition={condition}"] if condition else []))
        assert result.code == 0, result.err
        last = {"generate_recons": "reconstructions", "super_resolution": "decoded", "inverse_problem": "samples",
                "inpaint": "generated", "interpolate": "frames"}[script]
        images[condition] = [read_image(path).float() for path in sorted((output / last).glob("*.png"))]
    assert all(map(torch.equal, images[None], images["data"]))
    assert torch.equal(images["data"][0], images["cats"][0]) and not torch.equal(images["data"][-1], images["cats"][-1])
    assert not torch.equal(images["none"][0], images["cats"][0])


@pytest.mark.parametrize("more, line", [
    (["--condition=catz"], "--condition=catz is none of the 2 classes of the model; did you mean cats?"),
    (["--condition=2"], "--condition=2 is none of the 2 classes"),
    (["--guidance_interval=0.5"], "--guidance_interval=0.5 must be two fractions of the chain in order"),
    (["--guidance_interval=0.5,0.2"], "--guidance_interval=0.5,0.2 must be two fractions"),
    (["--guidance_scale=nan"], "it must be a finite number"),
    (["--decoder_config.data.condition=none"], "was trained with data.condition='class', the config has 'none'"),
    (["--decoder_config.data.root_dir=/nowhere"], "data.root_dir='/nowhere' is not a folder"),
])
def test_mistakes_in_sampling_are_one_line(runs, tmp_path, more, line):
    result = run_script(SAMPLES, *runs[1]["class"], "--output", tmp_path / "s", *more)
    assert line in only_line(result) and not (tmp_path / "s").exists()


def test_a_model_without_conditions_takes_none(trained, tmp_path):
    for flag in ("--condition=cats", "--guidance_scale=2"):
        line = only_line(run_script(SAMPLES, *trained[2], flag, "--output", tmp_path / "s"))
        assert f"{flag.split('=')[0]} needs a model with conditions" in line


def test_guidance_needs_dropout_of_conditions(runs, tmp_path):
    folder, commands = runs
    single = ["--config", commands["class"][3], f"--config.run.output_dir={tmp_path}", "--config.model.z_dim=0",
              "--config.model.condition_dropout=0.0"]
    assert run_script(STAGE_1, *single).code == 0
    sampling = [SAMPLES, *single, "--sampling_steps=2", "--num_samples=1", "--output", tmp_path / "s"]
    for flag in ("--guidance_scale=2", "--condition=none"):
        assert "tiny has model.condition_dropout=0" in only_line(run_script(*sampling, flag))
    assert run_script(*sampling).code == 0


def test_the_model_says_which_stage_follows_the_condition(runs, tmp_path):
    both, slow = runs[1]["class"], "--config.optimizer.learning_rate=0.01"  # rough training saturates images
    for which in ("latent", "decoder"):
        out = tmp_path / which
        places = [f"--{name}.run.output_dir={out}" for name in ("config", "decoder_config")]
        assert run_script(STAGE_1, "--config", both[3], places[0], slow,
                          f"--config.model.condition={which}").code == 0
        assert run_script(STAGE_2, *both, *places, slow).code == 0
        for stage, path in (("decoder", "tiny/checkpoint.pt"), ("latent", "tiny_sampler/latent_checkpoint.pt")):
            weights = load_checkpoint(out / path)["ema"]
            assert any("condition.null" in name for name in weights) == (which == stage)
        cats, dogs = (sample([*both, *places], out / name, f"--condition={name}") for name in ("cats", "dogs"))
        assert not torch.equal(cats, dogs)


def test_stage_2_refuses_images_with_other_conditions(runs, tmp_path):
    folder, commands = runs
    other = tmp_path / "data"
    for name in ("birds", "dogs"):
        (other / name).mkdir(parents=True)
        for i in range(9):
            picture(i).save(other / name / f"{i}.png")
    result = run_script(STAGE_2, *commands["class"], f"--decoder_config.data.root_dir={other}",
                        "--config.run.experiment=other")
    assert "other conditions than the autoencoder was trained on (the classes cats, dogs)" in only_line(result)
    result = run_script(SAMPLES, *commands["class"], f"--decoder_config.data.root_dir={other}", "--output",
                        tmp_path / "s")
    assert "have other conditions than the model, which takes the classes cats, dogs" in only_line(result)


def test_scores_and_report_of_each_class(runs, tmp_path):
    command, samples = runs[1]["class"], tmp_path / "samples"
    sample(command, samples, "--condition=data", count=12)
    score = ["experiments/calculate_fid.py", "--config", command[3], "--samples", samples, "--per_condition",
             "--feature_model=efficientnet_lite0", "--output", samples / "scores.json"]
    result = run_script(*score)
    assert result.code == 0, result.err
    record = json.loads((samples / "scores.json").read_text())
    counts = {name: (scores["count_a"], scores["count_b"]) for name, scores in record["per_condition"].items()}
    assert counts == {"cats": (6, 40), "dogs": (6, 39)} and record["num_samples"] == 12
    assert record["per_condition"]["cats"]["frechet"] != record["per_condition"]["dogs"]["frechet"]
    assert "cats: " in result.out and "names the class of" in result.out
    report = run_script("experiments/report.py", *command, "--folder", tmp_path, "--output", tmp_path / "r.html")
    assert report.code == 0, report.err
    assert "Samples of each class" in (tmp_path / "r.html").read_text()
    sample(command, tmp_path / "few", "--condition=data", count=6)
    assert "class 'cats' has 3 samples" in only_line(run_script(*score[:4], tmp_path / "few", *score[5:-2]))
    plain = [*score[:-2], f"--config.run.output_dir={tmp_path}", "--config.data.condition=none"]
    assert "--per_condition needs real images with classes" in only_line(run_script(*plain))


def test_the_classifier_by_colour(tmp_path):
    """Samples from elsewhere have the folder that they lie in as class; one of four is of the other colour."""
    for folder, values in (("samples/dark", (50, 50, 51, 200)), ("samples/light", (200, 199, 201, 200)),
                           ("real/dark", range(40, 60)), ("real/light", range(190, 210))):
        (tmp_path / folder).mkdir(parents=True)
        for i, value in enumerate(values):
            Image.new("RGB", (16, 16), (value, 100, 100)).save(tmp_path / folder / f"{i:02d}.png")
    cfg = config("folder", tmp_path / "real")
    cfg.data.condition = "class"
    train_set, heldout = build_dataset(cfg, True), build_dataset(cfg, False)
    parts = by_class(SampleFolder(tmp_path / "samples"), [train_set, heldout])
    assert {name: (len(part), sum(map(len, real))) for name, (part, real) in parts.items()} == {
        "dark": (4, 20), "light": (4, 20)}
    assert named_by_colour(parts, train_set, heldout) == {"samples": 7 / 8, "heldout": 1.0}
