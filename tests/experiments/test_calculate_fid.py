"""The command line, end to end. The script is imported once; every call of it runs in a fork of that process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import skimage.data
from PIL import Image

from experiments.metrics.fid import read_record

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

SERVER = """
import contextlib, json, os, sys
from experiments import calculate_fid
from utils import cli
for line in sys.stdin:
    arguments, folder, out, err = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        os.chdir(folder)
        sys.argv = ["calculate_fid.py", *arguments]
        code = 1
        try:
            cli.run(calculate_fid.main)
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

CONFIG = """
from configs.defaults import autoencoder_config

def get_config():
    config = autoencoder_config(32)
    config.run.output_dir = {output_dir!r}
    config.run.device = "cpu"
    config.data.name = "folder"
    config.data.root_dir = {root_dir!r}
    config.data.num_workers = 0
    return config
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def server():
    with subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(server, tmp_path):
    """run(*arguments) -> Result of the script, in an empty folder and with the offline network by default."""
    working = tmp_path / "working"
    working.mkdir()

    def call(*arguments, model="efficientnet_lite0"):
        out, err = tmp_path / "stdout", tmp_path / "stderr"
        for path in (out, err):
            path.write_text("")
        request = [[f"--feature_model={model}", *map(str, arguments)], *map(str, (working, out, err))]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return Result(int(server.stdout.readline()), out.read_text(), err.read_text())

    return call


def write_crops(folder, count, size, noise=0, seed=0):
    """Crops of photos as 00000.png, …; the same for the same seed, whatever the noise."""
    folder.mkdir()
    places = np.random.default_rng(seed)
    photos = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    for place in range(count):
        photo = photos[place % 3]
        top, left = (places.integers(0, side - 80) for side in photo.shape[:2])
        crop = photo[top:top + size[0], left:left + size[1]]
        crop = crop + np.random.default_rng(place).normal(0, noise, size=crop.shape)
        Image.fromarray(crop.round().clip(0, 255).astype(np.uint8)).save(folder / f"{place:05d}.png")
    return folder


@pytest.fixture
def real(tmp_path):
    return write_crops(tmp_path / "real", 8, (32, 32))


@pytest.fixture
def samples(tmp_path):
    return write_crops(tmp_path / "samples", 6, (32, 32), noise=30)


@pytest.fixture
def config(tmp_path, real):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(output_dir=str(tmp_path / "runs"), root_dir=str(real)))
    return path


LINE = re.compile(r"FD_efficientnet_lite0 (\d+\.\d\d) \((\d+) samples, (\d+) real images\) "
                  r"· KID (-?\d\.\d{4}) ± (\d\.\d{4}) · precision (\d\.\d{3}) · recall (\d\.\d{3})\n"
                  r"protocol: (?:.*)\n")


def check_line(result, pattern=LINE):
    """The numbers of the scores on stdout."""
    match = pattern.fullmatch(result.out)
    assert result.code == 0 and match, result
    return [float(group) for group in match.groups()]


def check_refused(result, match):
    assert result.code == 2 and result.out == ""
    assert result.err.count("\n") == 1 and re.search(match, result.err), result.err


def test_scores_against_the_data_set_of_a_config(run, config, samples, tmp_path):
    result = run("--config", config, "--samples", samples, "--output", tmp_path / "new" / "scores.json")
    distance, num_samples, num_real, kid, error, precision, recall = check_line(result)
    assert distance > 10 and num_samples == 6 and num_real == 7  # one of the eight is held out
    assert "6 samples and 7 real images: below 10000 the Fréchet distance is biased" in result.err
    assert "img/s" in result.err and "samples are 32x32" not in result.err
    record = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert record["score"] == "FD_efficientnet_lite0" and record["value"] == pytest.approx(distance, abs=0.006)
    assert record["kid"] == pytest.approx(kid, abs=6e-5)
    assert record["kid_standard_error"] == pytest.approx(error, abs=6e-5)
    assert (record["precision"], record["recall"]) == pytest.approx((precision, recall), abs=6e-4)
    assert record["neighbours"] == 3 and record["crops"] is None and record["size"] == [32, 32]
    assert record["num_samples"] == 6 and record["num_real_images"] == 7 and record["samples"] == str(samples)
    assert "7 training images of 32x32" in record["real_images"][0] and len(record["weights_sha256"]) == 64


def test_the_protocol_is_printed_with_what_departs_from_the_papers(run, config, samples):
    command = ("--config", config, "--samples", samples)
    assert run(*command).out.splitlines()[1] == (
        "protocol: 6 samples of 32x32, made in an unknown way; folder: 7 training images of 32x32, 3 channels, "
        f"{samples.parent / 'real'}; 8 bits, not flipped; features of efficientnet_lite0; not the paper's, with 6 "
        "samples, an unknown sampler, real images of folder, features of efficientnet_lite0")
    (samples / "settings.json").write_text(json.dumps({"sampler": "ddim", "steps": 20}))
    assert "6 samples, steps=20, eta=None, " in run(*command).out


def test_precision_and_recall_of_the_same_images_are_one(run, real):
    assert check_line(run("--samples", real, "--real", real))[5:] == [1, 1]
    refused = run("--samples", real, "--real", real, "--neighbours", 8)
    check_refused(refused, "8 samples are too few for a score; at least 9 are needed")


def test_real_images_are_scored_once(run, config, samples, tmp_path):
    command = ("--config", config, "--samples", samples)
    first, second = run(*command), run(*command)
    statistics = list((tmp_path / "runs" / "statistics").iterdir())
    assert check_line(first) == check_line(second) and len(statistics) == 1
    assert "real images: 100%" in first.err and "real images: 100%" not in second.err
    assert str(statistics[0]) in second.err

    statistics[0].write_bytes(b"damaged")
    assert check_line(run(*command)) == check_line(first)

    Image.new("RGB", (32, 32)).save(tmp_path / "real" / "00000.png")  # other data: another key
    assert check_line(run(*command)) != check_line(first)
    assert len(list((tmp_path / "runs" / "statistics").iterdir())) == 2


def test_the_same_images_are_at_distance_zero(run, real):
    """Also says that real images are not flipped, cropped or resized on the way."""
    distance, *_ = check_line(run("--samples", real, "--real", real))
    assert distance == 0


def test_a_real_folder_needs_no_config_and_takes_the_size_of_the_samples(run, tmp_path):
    samples = write_crops(tmp_path / "samples", 6, (24, 48))
    real = write_crops(tmp_path / "real", 7, (64, 48), seed=1)
    result = run("--samples", samples, "--real", real, "--output", "scores.json")
    assert check_line(result)[1:3] == [6, 7]
    record = json.loads((tmp_path / "working" / "scores.json").read_text())
    assert all("of 24x48" in described for described in record["real_images"])
    assert (tmp_path / "working" / "checkpoints" / "statistics").is_dir()


def test_statistics_of_a_real_folder_are_kept_while_it_stays_as_it_is(run, samples, tmp_path):
    real = write_crops(tmp_path / "other", 7, (32, 32), seed=1)
    command = ("--samples", samples, "--real", real)
    first, second = run(*command), run(*command)
    assert check_line(first) == check_line(second) and "real images: 100%" not in second.err
    Image.new("RGB", (32, 32)).save(real / "00007.png")
    third = run(*command)
    assert check_line(third)[2] == 8 and "real images: 100%" in third.err


def test_crops_see_what_resizing_removes(run, tmp_path):
    """Images with noise that is averaged away when they are made smaller."""
    real = write_crops(tmp_path / "real", 6, (80, 80))
    noisy = write_crops(tmp_path / "noisy", 6, (80, 80), noise=15)
    line = re.compile(LINE.pattern.replace("FD_", "crop-FD_"))
    command = ("--samples", noisy, "--real", real)
    crops = check_line(run(*command, "--crops", 12, "--crop_size", 24, "--output", "scores.json"), line)
    assert crops[1:3] == [12, 12] and crops[0] > 10
    record = json.loads((tmp_path / "working" / "scores.json").read_text())
    assert record["score"] == "crop-FD_efficientnet_lite0" and record["crops"] == 12 and record["crop_size"] == 24
    assert "crops instead of resized images" in record["unlike_the_paper"] and record["size"] == [80, 80]
    assert check_line(run("--samples", real, "--real", real, "--crops", 12, "--crop_size", 24), line)[0] == 0


def test_crops_of_a_data_set_come_from_images_of_the_size_of_the_samples(run, config, tmp_path):
    samples = write_crops(tmp_path / "large", 6, (48, 40), seed=1)
    result = run("--config", config, "--samples", samples, "--crops", 10, "--crop_size", 40, "--output", "scores.json")
    assert result.code == 0, result.err
    assert "of 48x40" in json.loads((tmp_path / "working" / "scores.json").read_text())["real_images"][0]
    check_refused(run("--config", config, "--samples", samples, "--crops", 10), "crop_size=224 does not fit .* 48x40")


def test_a_real_folder_goes_before_the_data_set_of_a_config(run, config, samples, tmp_path):
    other = write_crops(tmp_path / "other", 5, (32, 32), seed=1)
    assert check_line(run("--config", config, "--samples", samples, "--real", other))[2] == 5


def test_splits(run, config, samples):
    for split, count in [("train", 7), ("all", 8)]:
        assert check_line(run("--config", config, "--samples", samples, "--split", split))[2] == count
    check_refused(run("--config", config, "--samples", samples, "--split", "heldout"), "1 real images are too few")


def test_the_default_split_is_the_papers(run, config, samples):
    """All images of FFHQ, the training part of other data sets; --model is another name of --feature_model."""
    for name, count in [("ffhq", 8), ("celeba", 7)]:
        command = ("--config", config, f"--config.data.name={name}", "--samples", samples)
        result = run(*command, "--model", "efficientnet_lite0", model="inception_v3")
        assert check_line(result)[2] == count and "split=" not in result.out


@pytest.mark.parametrize("encoding, stdout, code", [("ascii", None, 0), ("cp932", None, 0), ("utf-8", "/dev/full", 0)])
def test_scores_are_written_whatever_happens_to_the_output(samples, real, tmp_path, encoding, stdout, code):
    """A terminal without "·" and "±", and an output that cannot be written."""
    command = [sys.executable, ROOT / "experiments" / "calculate_fid.py", "--feature_model=efficientnet_lite0",
               "--samples", samples, "--real", real, "--output=scores.json"]
    with open(stdout or tmp_path / "stdout", "w") as out:
        result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": encoding}, stdout=out,
                                stderr=subprocess.PIPE)
    assert result.returncode == code and b"Traceback" not in result.stderr, result.stderr
    record = read_record(tmp_path / "scores.json")
    assert record["num_samples"] == 6
    assert stdout or f"{record['value']:.2f}" in (tmp_path / "stdout").read_text(encoding)


def test_the_first_samples_by_name(run, config, real, samples, tmp_path):
    for path in samples.iterdir():
        path.rename(samples / f"1{path.name}")
    for path in sorted(real.iterdir())[:4]:
        (samples / path.name).write_bytes(path.read_bytes())
    clean = check_line(run("--config", config, "--samples", samples, "--num_samples", 4))
    noisy = check_line(run("--config", config, "--samples", samples))
    assert clean[1] == 4 and noisy[1] == 10 and clean[0] < noisy[0]


def test_latent_and_autoencoder_config_as_for_sampling(run, config, samples, tmp_path):
    latent = tmp_path / "latent.py"
    latent.write_text("from configs.defaults import latent_config\n\ndef get_config():\n    return latent_config()\n")
    runs = tmp_path / "latent_runs"
    alone = check_line(run("--decoder_config", config, "--samples", samples))
    both = run("--config", latent, "--config.run.output_dir", runs, "--decoder_config", config, "--samples", samples)
    assert check_line(both) == alone and (runs / "statistics").is_dir()
    check_refused(run("--config", latent, "--samples", samples), "--real FOLDER, or a .*--decoder_config configs")


def test_another_size_than_the_real_images_is_pointed_out(run, config, samples):
    result = run("--config", config, "--config.data.img_size=16", "--samples", samples)
    check_line(result)
    assert "samples are 32x32 but real images 16x16, data.img_size" in result.err
    same = run("--config", config, "--config.data.img_size=16", "--samples", samples, "--real_img_size=32")
    assert check_line(same) == check_line(run("--config", config, "--samples", samples)) and "but real" not in same.err


def test_mistakes(run, config, samples, real, tmp_path):
    command = ("--config", config, "--samples")
    check_refused(run("--config", config), "--samples is missing; give a folder, or --config and --decoder_config")
    check_refused(run("--samples", samples), "real images are missing; give --real FOLDER, or .*--config")
    check_refused(run("--samples", samples, "--config", tmp_path / "none.py"), "none.py: .* could not be loaded")
    check_refused(run(*command, tmp_path / "nowhere"), "is not a folder")
    check_refused(run("--samples", samples, "--real", tmp_path / "nowhere"), "--real=.* is not a folder")
    check_refused(run(*command, samples, "--num_samples", 7), "--num_samples=7, but .* only 6 images")
    check_refused(run(*command, samples, "--num_samples", 3), "3 samples are too few for a score; at least 4")
    check_refused(run(*command, samples, "--num_samples", 0), "num_samples")
    check_refused(run(*command, samples, "--split", "test"), "split")
    check_refused(run(*command, samples, "--sampling_steps", 5), "--sampling_steps is for making samples")
    check_refused(run(*command, samples, "--crop_size", 16), "--crop_size=16 needs --crops")
    check_refused(run(*command, samples, "--crops", 9, "--real_img_size", 16), "leave out --real_img_size")
    check_refused(run(*command, samples, "--real_img_size", "small"), "--real_img_size=small must be")
    check_refused(run(*command, samples, "--neighbours", 0), "neighbours")
    check_refused(run(*command, samples, "--output", tmp_path), "--output=.* is a folder")
    check_refused(run(*command, samples, "--weights", "nowhere.pt"), "--weights=nowhere.pt is not a file")
    check_refused(run(*command, samples, model="vgg"), "feature_model")
    check_refused(run(*command, samples, "--config.data.root_dir", tmp_path / "nowhere"), "data.root_dir=")
    check_refused(run(*command, samples, "--config.run.device", "tpu"), "run.device='tpu'")
    (tmp_path / "empty").mkdir()
    check_refused(run(*command, tmp_path / "empty"), "has no images")
    Image.new("RGB", (8, 8)).save(samples / "00003.png")
    check_refused(run(*command, samples), "images of different sizes")
    (samples / "00003.png").write_bytes(b"no picture")
    check_refused(run(*command, samples), "00003.png' can't be read")


def test_a_sample_with_damaged_pixels(run, config, samples):
    content = (samples / "00002.png").read_bytes()
    (samples / "00002.png").write_bytes(content[:len(content) // 2])
    for workers in (0, 2):
        result = run("--config", config, "--samples", samples, f"--config.data.num_workers={workers}")
        assert result.code == 2 and result.out == "" and "Traceback" not in result.err
        assert re.search(r"\nerror: image '.*00002.png' can't be read .*; make it again or delete it\n$", result.err)


def test_the_script_runs_from_anywhere(tmp_path):
    script = ROOT / "experiments" / "calculate_fid.py"
    result = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0  # absl would end with 1, which here is a fault
    for flag in ("config", "samples", "feature_model", "sampling_steps"):  # defined here and in other files
        assert f"  --{flag}:" in result.stdout
    assert "configs/ffhq_latent_config.py \\\n        --decoder_config" in result.stdout and result.stderr == ""
