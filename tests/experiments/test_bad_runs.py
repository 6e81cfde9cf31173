"""Mistakes about runs and folders: missing, damaged or foreign checkpoints, and folders with other contents. Each row
is refused in one line with exit code 2, and every file stays unchanged."""

import hashlib
import os
import pickle
import re
import shutil

import pytest
import torch
from PIL import Image

from tests.scripts import refused, run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file
from utils.checkpoint import FORMAT, MARK, load_checkpoint, save_checkpoint

STAGE_1, STAGE_2 = "train_inf_ae_diffusion.py", "train_latent_diffusion.py"
SAMPLES, RECONS = "experiments/generate_samples.py", "experiments/generate_recons.py"
EXPORT, PREPARE = "experiments/export_weights.py", "data/prepare.py"
NOISE, INPAINT = "experiments/generate_noise.py", "experiments/inpaint.py"


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """The working folder: a copy of the trained pair, its data and its configs, which refer to it by relative paths."""
    for run in ("tiny", "tiny_sampler"):
        shutil.copytree(trained[0] / "checkpoints" / run, tmp_path / "checkpoints" / run)
    shutil.copytree(trained[0] / "data", tmp_path / "data", copy_function=os.link)
    write_config_file(tiny_config("checkpoints", "data", "folder"), tmp_path / "ae.py")
    write_config_file(tiny_latent_config("checkpoints"), tmp_path / "latent.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(script):
    both = script in (STAGE_2, SAMPLES)
    configs = ["--config", "latent.py", "--decoder_config", "ae.py"] if both else ["--config", "ae.py"]
    return [script, *configs, *(["--sampling_steps=3"] if script in (SAMPLES, RECONS, INPAINT) else [])]


class Evil:
    def __reduce__(self):
        import os
        return os.system, ("touch it_ran",)


def sealed(dump, content):
    """Write the content with its checksum, as anybody can."""
    def spoil(path):
        with open(path, "wb") as file:
            dump(content, file)
        content_bytes = path.read_bytes()
        path.write_bytes(content_bytes + MARK + hashlib.blake2b(content_bytes, digest_size=32).hexdigest().encode())
    return spoil


malicious = sealed(pickle.dump, {"format": FORMAT, "kind": "autoencoder", "step": Evil()})


def malicious_zip(path):
    """As torch.save writes it, with a valid checksum."""
    save_checkpoint(path, {"kind": "autoencoder", "step": Evil()})


def change(**entries):
    return lambda path: save_checkpoint(path, load_checkpoint(path) | entries)


def put(name):
    return lambda path: shutil.copy(path.parent.parent / name, path)


def write(content):
    return lambda path: path.write_bytes(content)


def folder_instead(path):
    path.unlink()
    path.mkdir()


# (change to the checkpoint of stage 1, part of the one line)
SPOILED = {
    "gone": (lambda path: path.unlink(), "there is no checkpoint checkpoints/tiny/checkpoint.pt; train it first with "
             "train_inf_ae_diffusion.py, or set run.output_dir and run.experiment of the autoencoder config to"),
    "empty": (write(b""), "is not a readable checkpoint (no checksum at its end"),
    "text": (write(b"<html>404</html>" * 99), "is not a readable checkpoint (no checksum at its end"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-999]), "is not a readable checkpoint"),
    "a folder": (folder_instead, "checkpoint.pt is a folder, not a checkpoint; restore it, or start again"),
    "of the other stage": (put("tiny_sampler/latent_checkpoint.pt"), "holds a latent, not a autoencoder; check run"),
    "of another version": (change(format=1), f"format 1, this code reads format {FORMAT}, because the networks"),
    "of the future": (change(format=99), f"has checkpoint format 99, this code reads format {FORMAT}"),
    "no dictionary": (sealed(torch.save, [1]), "has checkpoint format list"),
    "a pickle that runs code": (malicious, "is not a readable checkpoint"),
    "a file of torch.save that runs code": (malicious_zip, "is not a readable checkpoint"),
}


@pytest.mark.parametrize("script", [STAGE_1, RECONS])
@pytest.mark.parametrize("spoil, said", SPOILED.values(), ids=SPOILED)
def test_a_checkpoint_that_is(place, script, spoil, said):
    path = place / "checkpoints" / "tiny" / "checkpoint.pt"
    spoil(path)
    if script == STAGE_1 and not path.exists():
        pytest.skip("it would train from the start")
    assert said in refused(place, *command(script))
    assert not (place / "it_ran").exists()


def test_latents_that_run_code_are_computed_again_and_weights_that_run_code_are_refused(place):
    (place / "checkpoints" / "new").mkdir()
    malicious_zip(place / "checkpoints" / "new" / "latents.pt")
    assert run_script(*command(STAGE_2), "--config.run.experiment=new").code == 0
    path = place / "checkpoints" / "tiny" / "checkpoint.pt"
    path.unlink()
    malicious(path.with_name("weights.safetensors"))
    assert "is not a readable file of weights" in refused(place, *command(RECONS))
    assert not (place / "it_ran").exists()


OTHER_CONFIGS = [
    (STAGE_1, "--config.model.nf=16", "was trained with model.nf=8, the config has 16; use the same value, or another"),
    (STAGE_1, "--config.model.uno_mults=(1,1)", "was trained with model.uno_mults=(1, 2), the config has (1, 1)"),
    (STAGE_1, "--config.diffusion.gaussian_filter_std=2.0", "diffusion.gaussian_filter_std=1.0, the config has 2.0"),
    (STAGE_1, "--config.data.img_size=32", "was trained with data.img_size=16, the config has 32"),
    (STAGE_1, "--config.train.load_checkpoint=False", "exists and train.load_checkpoint=False would overwrite it"),
    (STAGE_1, "--config.run.experiment=tiny_sampler", "run.experiment='tiny_sampler' is a run of another kind"),
    (STAGE_2, "--config.run.experiment=tiny", "is also that of the autoencoder"),
    (STAGE_2, "--config.model.num_layers=3", "was trained with model.num_layers=2, the config has 3"),
    (STAGE_2, "--config.model.z_dim=7", "config.model.z_dim=7 differs from decoder_config.model.z_dim=6"),
    (STAGE_2, "--config.train.batch_size=153", "train.batch_size=153 is more than the 152 latents"),
    (STAGE_2, "--decoder_config.run.experiment=absent", "there is no checkpoint checkpoints/absent/checkpoint.pt"),
    (RECONS, "--config.model.learn_sigma=True", "was trained with model.learn_sigma=False, the config has True"),
    (RECONS, "--config.run.experiment=tiny_sampler", "there is no checkpoint checkpoints/tiny_sampler/checkpoint.pt"),
    (SAMPLES, "--decoder_config.model.nf=16", "model.nf=8, the config has 16"),
    (SAMPLES, "--config.run.experiment=absent", "best_latent_checkpoint.pt; train it first with "
                                                "train_latent_diffusion.py, or set run.output_dir and run.experiment "
                                                "of the latent config to"),
]


@pytest.mark.parametrize("script, flag, said", OTHER_CONFIGS, ids=[" ".join(row[:2]) for row in OTHER_CONFIGS])
def test_a_run_of_another_config(place, script, flag, said):
    assert said in refused(place, *command(script), flag)


SAMPLING = [
    ("--sample_img_size=12", "--sample_img_size=12 must be a number of pixels, at least 16, or HEIGHTxWIDTH"),
    ("--sample_img_size=big", "--sample_img_size=big must be"), ("--sample_img_size=-32", "--sample_img_size=-32 must"),
    ("--sample_img_size=32x", "--sample_img_size=32x must be"), ("--sample_img_size=1e3", "--sample_img_size=1e3 must"),
    ("--sample_img_size=20000", "asks for 20000x20000 pixels"), ("--sample_img_size=100000", "must be at most 65536"),
    ("--sample_img_size=20000 --window 0 0 1 1", "--window=0 0 1 1 asks for 20000x20000 pixels"),
    ("--sampling_steps=0", "sampling_steps=0"), ("--sampling_steps=21", "error: --sampling_steps=21 must lie"),
    ("--latent_sampling_steps=21", "error: --latent_sampling_steps=21 must lie"),
    ("--eta=2", "eta=2"), ("--eta=-1", "eta=-1"),
    ("--eta=1 --sampler=ddpm", "--eta=1.0 applies to --sampler=ddim only; leave it out"),
    ("--sampler=euler", "sampler=euler"), ("--latent_sampler=euler", "latent_sampler=euler"),
    ("--num_samples=0", "num_samples=0"), ("--max_points=0", "max_points=0"),
    ("--max_points=40 --sample_img_size=64", "--max_points=40 is too few"),
    ("--window 0 0.5", "--window=0 0.5 must be four numbers"), ("--window=0,0,2,1", "--window=0,0,2,1 must"),
    ("--window 0.5 0 0.5 1", "with 0 <= x0 < x1"), ("--window 0 0 a 1", "--window=0 0 a 1 must"),
    ("--window", "--window= must be four numbers"), ("--window nan 0 1 1", "--window=nan 0 1 1 must"),
    ("--window -0.1 0 1 1", "--window=-0.1 0 1 1 must"), ("--eta=nan", "--eta=nan: it must be a finite number"),
    ("--config.train.sample_size=0", "config.train.sample_size=0 must be at least 1"),
    ("--config.data.fid_samples=0", "config.data.fid_samples=0 must be at least 1"),
    ("--output=ae.py", "--output=ae.py: 'ae.py' is not a folder"),
    ("--output=ae.py/x", "--output=ae.py/x: 'ae.py' is not a folder"),
    ("--output=data", "--output=data holds images of unknown origin; choose another folder"),
    ("--output=/proc/none", "--output=/proc/none: '/proc' cannot be written"),
]


@pytest.mark.parametrize("flags, said", SAMPLING, ids=[row[0] for row in SAMPLING])
def test_sampling(place, flags, said):
    assert said in refused(place, *command(SAMPLES), "--num_samples=1", *flags.split())


# folders with other contents, and files instead of folders
OUTPUTS = [
    (STAGE_1, "--config.run.output_dir=ae.py", "run.output_dir='ae.py': 'ae.py' is not a folder; choose another"),
    (STAGE_2, "--config.run.output_dir=ae.py", "run.output_dir='ae.py': 'ae.py' is not a folder; choose another"),
    (STAGE_1, "--config.run.experiment=tiny/config.json", "tiny/config.json' is not a folder; choose another"),
    (EXPORT, "--output=w.pt", "--output=w.pt must end with .safetensors"),
    (EXPORT, "--output=ae.py/w.safetensors", "--output=ae.py/w.safetensors: 'ae.py' is not a folder; choose another"),
    (PREPARE, "--output=ae.py", "--output=ae.py: 'ae.py' is not a folder"),
    (PREPARE, "--output=data", "is data.root_dir itself"),
    (PREPARE, "--output=checkpoints", "other files"),
]


@pytest.mark.parametrize("script, flag, said", OUTPUTS, ids=[" ".join(row[:2]) for row in OUTPUTS])
def test_an_output(place, script, flag, said):
    assert said in refused(place, *command(script), flag)


APPLY, WALK, SPECTRUM = (f"experiments/{name}.py" for name in ("super_resolution", "interpolate", "spectrum"))
ABLATE, COMPARE, REPORT, BENCHMARK = (f"experiments/{name}.py" for name in (
    "ablate", "compare_resolutions", "report", "benchmark"))
PIXELS = "--input=dots has images of 1x1, fewer pixels than model.knn_neighbours=3; give larger ones"
IS_FOLDER = "--output=data is a folder; give the name of a file"
CONFIG = "--config=ae.py"
TEN_STEPS = f"{CONFIG} --axes=encoder --steps=10"

# mistakes that would otherwise show only after long work, or after something was written
LATE = [
    (APPLY, f"{CONFIG} --sampling_steps=3 --input=dots", PIXELS),
    (APPLY, f"{CONFIG} --sampling_steps=3 --input=text", "image 'text/00000.png' can't be read"),
    (APPLY, f"{CONFIG} --sampling_steps=21", "--sampling_steps=21 must lie"),
    (APPLY, f"{CONFIG} --sampling_steps=3 --input=data --scale=1000000", "--scale=1000000 asks for 20000000x20000000"),
    (RECONS, f"{CONFIG} --sampling_steps=3 --sample_img_size=20000", "--sample_img_size=20000 asks for"),
    (WALK, f"{CONFIG} --sampling_steps=3 --input=dots", PIXELS),
    (WALK, f"{CONFIG} --sampling_steps=3 --input=data --reach=1e308", "--reach=1e308: 1e+308 is not a number in"),
    (WALK, f"{CONFIG} --sampling_steps=3 --input=data --latent_config=ae.py", "leave one out"),
    (WALK, f"{CONFIG} --sampling_steps=3 --latent_config=ae.py", "--latent_config is an autoencoder config"),
    (WALK, f"{CONFIG} --sampling_steps=3 --input=data --sample_img_size=32", "--sample_img_size=32 applies to"),
    (INPAINT, f"{CONFIG} --sampling_steps=3 --input=dots", PIXELS),
    (SPECTRUM, f"{CONFIG} --samples=text", "image 'text/00000.png' can't be read"),
    (SPECTRUM, "--config=latent.py --samples=data", "--config is not an autoencoder config"),
    (COMPARE, "--reference=data --samples=text", "image 'text/00000.png' can't be read"),
    (COMPARE, "--reference=data --samples=cut", "image 'cut/00000.png' can't be read"),
    (COMPARE, "--reference=data --samples=data --output=data", IS_FOLDER),
    (REPORT, f"{CONFIG} --output=data", IS_FOLDER),
    (REPORT, f"{CONFIG} --search=-1", "search=-1"),
    (BENCHMARK, f"{CONFIG} --output=data", IS_FOLDER),
    (BENCHMARK, f"{CONFIG} --suites=", "--suites= is unknown; choose from operator"),
    (ABLATE, f"{CONFIG} --steps=10 --axes=", "--axes= is unknown; choose from encoder"),
    (ABLATE, f"{CONFIG} --minutes=nan", "--minutes=nan: it must be a finite number"),
    (ABLATE, f"{CONFIG} --minutes=inf", "--minutes=inf: it must be a finite number"),
    (ABLATE, f"{TEN_STEPS} --sampling_steps=21", "--sampling_steps=21 must lie"),
    (ABLATE, f"{TEN_STEPS} --sampling_steps=3 --config.train.batch_size=77", "batch_size=77 is more than the"),
    (ABLATE, f"{TEN_STEPS} --sampling_steps=3 --config.train.accumulation_steps=3", "must be a multiple of 3"),
    (ABLATE, f"{TEN_STEPS} --sampling_steps=3 --config.data.root_dir=dots --config.train.batch_size=1",
     "1 held-out images are too few for a score; at least 4"),
]


@pytest.mark.parametrize("script, flags, said", LATE, ids=[f"{row[0][12:-3]} {row[1]}" for row in LATE])
def test_a_mistake_is_found_before_the_work(place, script, flags, said):
    for name, make in (("dots", lambda path: Image.new("RGB", (1, 1)).save(path)),
                       ("text", lambda path: path.write_text("<html>404</html>")),
                       ("cut", lambda path: path.write_bytes((place / "data" / path.name).read_bytes()[:-40]))):
        (place / name).mkdir()
        for image in ("00000.png", "00001.png"):
            make(place / name / image)
    network = ["--feature_model=efficientnet_lite0"] if script == ABLATE else []
    assert said in refused(place, script, *flags.split(), *network)


IN_PROC = {  # script: flags that have it write below /proc, where not even the superuser can
    STAGE_1: f"{CONFIG} --config.run.output_dir=/proc/none",
    SAMPLES: "--config=latent.py --decoder_config=ae.py --sampling_steps=3 --output=/proc/none",
    RECONS: f"{CONFIG} --sampling_steps=3 --output=/proc/none/r", NOISE: f"{CONFIG} --output=/proc/none",
    INPAINT: f"{CONFIG} --sampling_steps=3 --output=/proc/none", PREPARE: f"{CONFIG} --output=/proc/none",
    APPLY: f"{CONFIG} --sampling_steps=3 --input=data --output=/proc/none",
    WALK: f"{CONFIG} --sampling_steps=3 --output=/proc/none/i", EXPORT: f"{CONFIG} --output=/proc/w.safetensors",
    SPECTRUM: f"{CONFIG} --samples=data --output=/proc/none", REPORT: f"{CONFIG} --output=/proc/page.html",
    COMPARE: "--reference=data --samples=data --output=/proc/none.json",
    ABLATE: f"{CONFIG} --steps=10 --sampling_steps=3 --output=/proc/none/out",
    BENCHMARK: f"{CONFIG} --output=/proc/none.json",
}


@pytest.mark.parametrize("script, flags", IN_PROC.items(), ids=IN_PROC)
def test_a_folder_that_cannot_be_written(place, script, flags):
    line = refused(place, script, *flags.split())
    assert "cannot be written (" in line and re.search("--output='?/proc|output_dir='/proc", line)
