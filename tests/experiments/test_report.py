"""report.py: the contents of the page, with and without images and scores of the run."""

import base64
import io
import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image, ImageSequence

from experiments.lib.report_sections import ZOOM, GeneratedImages, zoom
from tests.scripts import only_line, run_script
from tests.tiny import tiny_config

REPORT, SAMPLES = "experiments/report.py", "experiments/generate_samples.py"


def check_self_contained(text):
    """Check that the page is well-formed, loads nothing and holds no placeholder."""
    outside = re.sub(r"data:[^\"]*", "", text)
    assert not re.search(r"https?:|\bsrc=\"[^\"]|<script|<link|@import|url\(", outside)
    assert "$" not in outside and "nan" not in outside
    for tag in ("section", "table", "figure", "div", "tr", "td", "th", "p", "h2"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def headings(text):
    return re.findall("<h2>(.*?)</h2>", text)


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """A folder with the output of all other scripts for the trained pair, as in `make demo`."""
    _, single, both = trained
    folder = tmp_path_factory.mktemp("made")
    results = [run_script("experiments/generate_recons.py", *single, "--sampling_steps=2", "--output",
                          folder / "recons")]
    for scale, window in ((4, []), (1, []), (8, ["--window", "0.25", "0.25", "0.5", "0.5"])):
        results.append(run_script(SAMPLES, *both, "--num_samples=4", "--sampling_steps=3", *window,
                                  f"--sample_img_size={16 * scale}", "--output", folder / f"samples_{scale}x"))
    for script, flags in {"super_resolution": ["--input", folder / "recons" / "originals"], "inpaint": [],
                          "interpolate": ["--num_pairs=1"]}.items():
        results.append(run_script(f"experiments/{script}.py", *single, "--sampling_steps=2", *flags, "--output",
                                  folder / script))
    results.append(run_script("experiments/generate_noise.py", *single, "--output", folder / "noise"))
    for name, images in (("samples", "samples_1x"), ("noise", "noise")):
        results.append(run_script(
            "experiments/calculate_fid.py", *single, "--split=heldout", "--samples", folder / images,
            "--feature_model=efficientnet_lite0", "--output", folder / f"{name}_scores.json"))
    assert not any(result.code for result in results), [result.err for result in results if result.code]
    return folder


def make_page(page, *arguments):
    result = run_script(REPORT, *arguments, "--output", page)
    assert result.code == 0 and str(page) in result.out, result.err
    text = page.read_text()
    check_self_contained(text)
    return text, result.out


@pytest.mark.slow
def test_the_page_holds_every_output(trained, made, tmp_path):
    rows = [{"path": "fast", "rate": rate, "ms": 5.0, "peak MB": 2.0} for rate in ("1/1", "1/4")]
    (made / "benchmark.json").write_text(json.dumps({"suites": {"training": rows}}))
    text, out = make_page(tmp_path / "page.html", *trained[2], "--folder", made, "--pictures", tmp_path)
    with Image.open(tmp_path / "demo.png") as demo, Image.open(tmp_path / "cost.png") as cost:
        assert demo.size[0] == 4 * 128 and cost.size[0] > cost.size[1]  # columns of the originals and of three folders
    assert "2 folders of samples, 1 of reconstructions, 3 of applications, 2 scores" in out
    assert headings(text) == ["Reconstructions of held-out images", "Scores", "Losses", "Samples",
                              "Nearest training images", "Applications", "While training",
                              "Config, where it differs from the defaults", "Environment"]
    assert text.index("samples of 16x16 (1×), 3 steps of ddim") < text.index("samples of 64x64 (4×), 3 steps of ddim")
    assert "of 4 reconstructions, their own original is the nearest" in text and "ANOTHER CHECKPOINT" not in text
    assert "nearest of 76 of the 76 training images" in text
    assert f"<figcaption>{made}/interpolate, 2 steps: frames</figcaption>" in text
    assert "<th>method</th><th>consistency psnr</th>" in text and "<td>lanczos</td>" in text
    assert text.count("FD_efficientnet_lite0</td>") == 2 and "mollified noise with the mean and variance" in text
    assert "<td>model.nf</td><td>64</td><td>8</td>" in text and "<td>mc_integral.q_sample</td>" not in text
    assert "4 steps in" in text and "<td>torch</td>" in text and "<td>machine</td>" in text


@pytest.mark.slow
def test_the_first_screen_mixes_real_images_and_samples_and_tells_which_are_which(trained, made, tmp_path):
    text, _ = make_page(tmp_path / "page.html", *trained[2], "--folder", made, "--search=0")
    screen = text.partition("<h2>")[0]
    quiz = re.findall('base64,([^"]*)" alt="picture [0-9]*" class=(real|made)', screen)
    for kind, folder in (("real", "recons/originals"), ("made", "samples_1x")):
        assert sorted(pixels(base64.b64decode(data)) for data, kind_ in quiz if kind_ == kind) == sorted(
            pixels(path.read_bytes()) for path in (made / folder).glob("*.png"))
    answer = re.search("along the rows: ([^.]*)", screen)[1]
    assert answer == ", ".join(str(place) for place, (_, kind) in enumerate(quiz, 1) if kind == "real")
    pairs = re.findall('<figure class=pair>(.*?)<figcaption>(.*?)</figcaption>', screen)
    assert [image.count("<img") for image, _ in pairs] == [2, 2]
    assert ["enlarged" in caption for _, caption in pairs] == [False, True]
    assert screen.count("image/gif") == 1 and text.count("128x128") == 0


def pixels(content):
    return np.array(Image.open(io.BytesIO(content))).tobytes()


def test_every_frame_of_the_zoom_shows_its_part_of_the_image(tmp_path):
    """The image is a ramp, so the mean of a frame is the position of its centre; the finest window is off-centre."""
    found, middle = [], 0.375
    for side, window in ((256, None), (512, [[0, 256], [64, 320]])):
        first, end = window[1] if window else (0, side)
        ramp = np.broadcast_to(255 * (np.arange(first, end) + 0.5) / side, (end - first, end - first)).round()
        found.append(GeneratedImages(tmp_path / str(side), {"size": [side, side], "window": window}))
        found[-1].path.mkdir()
        Image.fromarray(ramp.astype(np.uint8)).save(found[-1].path / "00000.png")
    page = zoom(found, "00000.png", tiny_config(tmp_path))
    animation = Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]*)', page)[1])))
    frames = [np.array(frame.convert("L")) for frame in ImageSequence.Iterator(animation)]
    frames = frames[:len(frames) // 2 + 1]
    sides = ZOOM ** -np.linspace(0, 1, len(frames))
    left = (middle - 0.5 / ZOOM) * (1 - sides) / (1 - 1 / ZOOM)
    assert np.allclose([frame.mean() for frame in frames], 255 * (left + sides / 2), atol=1.5)
    assert np.allclose([float(np.ptp(frame)) for frame in frames], 255 * sides, atol=3)


@pytest.mark.slow
def test_the_search_for_copies_is_limited_or_left_out(trained, made, tmp_path):
    text, _ = make_page(tmp_path / "page.html", *trained[2], "--folder", made, "--search=10")
    assert "nearest of 10 of the 76 training images" in text
    text, _ = make_page(tmp_path / "page.html", *trained[2], "--folder", made, "--search=0")
    assert "Nearest training images" not in headings(text)


@pytest.mark.slow
def test_images_of_another_checkpoint_are_marked(trained, made, tmp_path):
    text, _ = make_page(tmp_path / "page.html", *trained[2], "--folder", made)
    settings = made / "samples_4x" / "settings.json"
    content = settings.read_text()
    settings.write_text(re.sub(r'"decoder": "[^"]*"', '"decoder": "an older file"', content))
    other, _ = make_page(tmp_path / "page.html", *trained[2], "--folder", made)
    settings.write_text(content)
    assert text.count("ANOTHER CHECKPOINT") == 0
    assert re.findall("<figcaption>samples of ([^ ]*) [^<]*; MADE BY ANOTHER CHECKPOINT", other) == ["64x64"]


@pytest.mark.slow
def test_the_command_that_training_prints_makes_the_page_of_one_run(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = "--config.train.max_steps=2", "--config.optimizer.warmup_steps=1", "--config.model.nf=4"
    ended = run_script("train_inf_ae_diffusion.py", *trained[1], f"--config.run.output_dir={tmp_path / 'a run'}",
                       *overrides)
    last = ended.out.strip().splitlines()[-1]
    assert [override in last for override in overrides] == [False, False, True]
    assert last.startswith("for a page about this run: python experiments/report.py --config ")
    result = run_script(*shlex.split(last.partition("python ")[2]))
    text = (tmp_path / "a run" / "tiny" / "report.html").read_text()
    assert result.code == 0 and "0 folders of samples" in result.out
    check_self_contained(text)
    assert headings(text) == ["Losses", "While training", "Config, where it differs from the defaults", "Environment"]
    assert "small diffusion model over its latents" not in text


@pytest.mark.slow
def test_outputs_in_default_folders_are_found(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_script(SAMPLES, *trained[2], "--num_samples=2", "--sampling_steps=2").code == 0
    assert run_script("experiments/generate_recons.py", *trained[1], "--sampling_steps=2").code == 0
    assert run_script("experiments/inpaint.py", *trained[1], "--sampling_steps=2", "--mask=half").code == 0
    shutil.copytree("inpainting/tiny_half", "inpainting/tiny_of_another_run")
    record = tmp_path / "inpainting" / "tiny_of_another_run" / "scores.json"
    record.write_text(record.read_text().replace('"experiment": "tiny"', '"experiment": "tiny_of"'))
    (tmp_path / "samples" / "tiny_sampler_2_16x16").mkdir()  # of a run whose name begins as this one's does
    Image.new("RGB", (16, 16)).save(tmp_path / "samples" / "tiny_sampler_2_16x16" / "00000.png")
    text, out = make_page(tmp_path / "page.html", *trained[2])
    assert "1 folders of samples, 1 of reconstructions, 1 of applications, 0 scores" in out
    assert "<figcaption>inpainting/tiny_half, 2 steps: grid</figcaption>" in text and "psnr unknown " in text


@pytest.mark.slow
def test_a_run_without_its_checkpoint_has_a_page(trained, made, tmp_path):
    folder, single, _ = trained
    shutil.copytree(made / "inpaint", tmp_path / "inpaint")
    Image.new("RGB", (5000, 10)).save(tmp_path / "inpaint" / "wide.png")
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    shutil.copy(folder / "checkpoints" / "tiny" / "metrics.jsonl", tmp_path / "runs" / "tiny")
    text, out = make_page(tmp_path / "page.html", *single, f"--config.run.output_dir={tmp_path / 'runs'}", "--folder",
                          tmp_path)
    assert "1 of applications" in out and "2 steps; MADE BY ANOTHER CHECKPOINT than that of this run: grid" in text


@pytest.mark.slow
def test_a_folder_whose_name_is_not_utf_8_is_shown(trained, tmp_path):
    root = tmp_path / os.fsdecode(b"data \xff")
    root.symlink_to(trained[0] / "data")
    text, _ = make_page(tmp_path / "page.html", *trained[1], f"--config.data.root_dir={root}")
    assert f"{tmp_path}/data ?" in text


MADE = '{"decoder": 3, "size": %s, "steps": 1, "sampler": [], "seconds": %s, "window": null, "experiment": "tiny"}'
FOREIGN = {  # file name: contents that other programs, or an editor, may leave
    "settings.json": ["{", "[1]", MADE % ("5", 1), MADE % ('"16x16"', 1), MADE % ("[1]", 1),
                      MADE % ("[16, 16]", '"3"')],
    "scores.json": ['{"settings": []}', '{"settings": {"decoder": 3}}', '{"nearest_is_own": 1}', "[1]", "{",
                    '{"settings": %s, "methods": [1]}' % (MADE % ("[1, 1]", 1))],
    "other.json": ['{"kid": "good"}', '{"kid": 1}', '{"kid": 1, "kid_standard_error": 1, "precision": 1, "recall": 1, '
                   '"value": 1, "score": 3, "samples": [], "sampling": 3, "size": [1, 1]}'],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_files_of_other_origin_are_left_out(trained, made, tmp_path):
    shutil.copytree(made / "recons", tmp_path / "recons")
    shutil.copy(made / "noise_scores.json", tmp_path)
    for name, contents in FOREIGN.items():
        for number, content in enumerate(contents):
            folder = tmp_path / f"{name} {number}"
            shutil.copytree(made / "samples_1x", folder)
            (folder / name).write_text(content)
    (tmp_path / "recons" / "scores.json").write_text(FOREIGN["scores.json"][2])
    text, out = make_page(tmp_path / "page.html", *trained[2], "--folder", tmp_path)
    assert "1 scores" in out and "Protocol of" in text


@pytest.mark.slow
def test_damaged_images_are_left_out(trained, made, tmp_path, caplog):
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    spoiled = [folder / name for name in ("samples_1x/00001.png", "recons/originals/00000.png", "inpaint/grid.png")]
    for path in (*spoiled, *(folder / "samples_4x").glob("*.png")):
        path.write_bytes(path.read_bytes()[:60])
    Image.new("RGB", (8, 8)).save(folder / "samples_1x" / "00002.png")
    text, _ = make_page(tmp_path / "page.html", *trained[2], "--folder", folder)
    assert "<figcaption>samples of 16x16" in text and "<figcaption>samples of 64x64" not in text
    assert "inpaint, 2 steps: grid" not in text and "superresolution, 2 steps: grid" in text.replace("_", "")
    assert all(str(path) in caplog.text for path in spoiled)
    shown = [picture.size for picture in pictures_of(text, ("originals", "reconstructions of 16x16"))]
    assert shown == [(32, 32)] * 2  # three pairs of 16², in a grid of two columns


def pictures_of(text, captions):
    """Pillow images of the figures with captions that begin with these words."""
    for caption in captions:
        data = re.search(rf'base64,([^"]*)" [^>]*><figcaption>{caption}', text)[1]
        yield Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_caption_names_different_scales_of_the_axes(tmp_path):
    scales = [GeneratedImages(tmp_path, {"size": size}).scale(tiny_config(tmp_path)) for size in ([48, 24], [32, 32])]
    assert scales == ["3× and 1.5×", "2×"]


def test_mistakes_are_one_line(trained, tmp_path):
    _, single, both = trained
    refused = {"--config is missing|autoencoder is missing": [], "the autoencoder is missing|an autoencoder": both[:2],
               "there is no run in .*absent": [*single, "--config.run.experiment=absent"],
               "--folder=.*nowhere is not a folder": [*single, "--folder", tmp_path / "nowhere"],
               "is an autoencoder config": [*single, "--decoder_config", single[1]], "search": [*single, "--search=-1"]}
    for message, arguments in refused.items():
        assert re.search(message, only_line(run_script(REPORT, *arguments))), message
