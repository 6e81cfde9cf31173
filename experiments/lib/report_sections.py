"""Sections of the page of report.py, from the files of a run and of other scripts; "" if there are no such files."""

import contextlib
import datetime
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Subset

from data.datasets import build_dataset
from data.datasets.base import spread
from data.images import UNREADABLE, read_image
from data.loader import all_batches, oriented, to_float
from diffusion.gaussian_diffusion import build_diffusion
from experiments.lib.html_report import embed, figure, grid, most_images, paragraph, picture, row, section, table
from experiments.lib.image_folders import heldout_images
from experiments.lib.plots import cost_plot, gif, line_plot, save_grid, to_bytes
from experiments.metrics import fid
from experiments.metrics.images import nearest_images
from models.load import autoencoder_path, latent_path, load_trained
from utils import rng
from utils.checkpoint import identity
from utils.config import changed_fields, run_dir
from utils.device import environment, resolve_device
from utils.errors import UserError
from utils.files import read_json, replacing
from utils.images import to_pil, to_uint8
from utils.logging import read_metrics, training_seconds

MAX_COMPARED = 64  # samples, and held-out images, whose nearest training images are searched
MAX_SHOWN = 8  # samples shown beside their nearest training images
QUIZ = 20  # real images in the quiz, and samples
SCALES = 4  # resolutions at which one sample is shown
ZOOM, FRAME, FRAMES = 8, 224, 20  # magnification, side in pixels, and number of frames of the animation
CANDIDATES = 8  # images of which the one with the most contrast is shown large
ROWS = 4  # of the picture of the README


class GeneratedImages(NamedTuple):
    """A folder of images and how they were made (its settings.json)."""

    path: Path
    settings: dict

    def images(self, count=64):
        """{file name: uint8 [C, H, W]} of the first images by name, without damaged ones and those of another shape."""
        found = {file.name: _read(file) for file in sorted(self.path.glob("*.png"))[:count]}
        shape = next((image.shape for image in found.values() if image is not None), None)
        return {name: image for name, image in found.items() if image is not None and image.shape == shape}

    def scale(self, decoder_config):
        """Relative to the training resolution, for example 4×."""
        return " and ".join(dict.fromkeys(f"{length / decoder_config.data.img_size:g}×"
                                          for length in self.settings["size"]))

    def caption(self, name, decoder_config):
        """Size, steps, sampler and time, with a warning if another checkpoint than the run's made the images."""
        return (f"{name} of {_size(self)} ({self.scale(decoder_config)}), {self.settings['steps']} steps of "
                f"{self.settings['sampler']}, {len(list(self.path.glob('*.png')))} in {self.settings['seconds']:.0f} s"
                + _warning(self.settings["decoder"], decoder_config))


def _size(found):
    return "x".join(map(str, found.settings["size"]))


def _read(path):
    """uint8 [C, H, W], or None and a warning if the file is damaged."""
    try:
        return read_image(path)
    except UNREADABLE as error:
        logging.warning("%s cannot be read (%s) and is left out", path, error)
        return None


def _made_from(path, make, *arguments):
    """make(*arguments), or None and a warning if the files at `path` are damaged or not those of this project."""
    try:
        return make(*arguments)
    except (*UNREADABLE, TypeError, AttributeError) as error:
        logging.warning("%s is left out, as it is damaged or of another origin (%s: %s)", path, type(error).__name__,
                        error)
        return None


def _warning(decoder, config):
    """"" if `decoder`, utils.checkpoint.identity of the checkpoint that made the images, is that of the run."""
    path = autoencoder_path(config)
    return "" if path.is_file() and decoder == identity(path) else "; MADE BY ANOTHER CHECKPOINT than that of this run"


def find_images(folders):
    """(samples, windows of samples, reconstructions): GeneratedImages of each folder, sorted by size."""
    found = [GeneratedImages(path, read_json(path / "settings.json")) for path in folders if any(path.glob("*.png"))]
    found = [one for one in found if {"decoder", "size", "sampler", "steps", "seconds"} <= one.settings.keys()
             and _made_from(one.path, _check_numbers, one.settings)]
    found.sort(key=lambda one: one.settings["size"])
    samples = [one for one in found if "window" in one.settings]
    return ([one for one in samples if not one.settings["window"]], [one for one in samples if one.settings["window"]],
            [one for one in found if one.path.name == "reconstructions"])


def _check_numbers(settings):
    height, width = settings["size"]
    return isinstance(height + width + settings["seconds"], (int, float))


def progress(configs):
    """Steps, seconds and held-out loss of each run."""
    lines = []
    for config in configs:
        metrics = read_metrics(run_dir(config) / "metrics.jsonl")
        if not metrics:
            lines.append(f"{config.run.experiment}: weights without a record of their training")
            continue
        losses = [line["validation_loss"] for line in metrics if "validation_loss" in line]
        loss = f", held-out loss {losses[-1]:.4g}" if losses else ""
        steps = max(line["step"] for line in metrics)
        lines.append(f"{config.run.experiment}: {steps} steps in {training_seconds(metrics):.0f} s{loss}")
    return paragraph(" · ".join(lines))


def training_images(configs, size):
    """The last images of each kind that training has written, tiles of size²; wide ones are cropped on the right."""
    figures = []
    for config in configs:
        last = {path.stem.rpartition("_")[0]: path for path in sorted((run_dir(config) / "images").glob("*.png"))}
        for name, path in last.items():
            image = _read(path)
            if image is not None:
                caption = f"{name} of {config.run.experiment}, step {path.stem.rpartition('_')[2].lstrip('0')}"
                figures.append(grid(image[None, :, :, :16 * size], caption, scale=2 if size <= 32 else 1))
    return section("While training", row(*figures))


def first_screen(samples, windows, config):
    """A quiz, an animation into one sample, and this sample at several resolutions beside a real image."""
    shown = samples[:SCALES]
    windows = [one for one in windows if shown and one.settings["decoder"] == shown[-1].settings["decoder"]]
    name = _most_contrast(shown + windows)
    animation = name and windows and _made_from(windows[-1].path, zoom, shown[-1:] + windows, name, config)
    return row(quiz(samples, config), animation or "") + row(*scales(shown, name, config))


def _most_contrast(found):
    """Name of an image that all folders hold, the one with the largest deviation; "" if there is none."""
    images = found[0].images(CANDIDATES) if found else {}
    deviations = {name: image.float().std().item() for name, image in images.items()
                  if all((one.path / name).is_file() for one in found)}
    return max(deviations, key=deviations.get, default="")


def _resized(images, size):
    """uint8 images [N, C, H, W] at another size, with antialiasing."""
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)


def quiz(found, config):
    """Held-out images and samples of the training size in a mixed order, and the answer."""
    size, heldout = config.data.img_size, build_dataset(config, train=False)
    samples = [image for one in found if one.settings["size"] == [size, size] for image in one.images(QUIZ).values()]
    count = min(len(samples), len(heldout), most_images(size, 2 * size, QUIZ))
    if count == 0:
        return ""
    kinds = [*((heldout[i], "real") for i in spread(len(heldout), count)), *((one, "made") for one in samples[:count])]
    order = torch.randperm(2 * count, generator=rng.generator("cpu", config.run.seed, "quiz")).tolist()
    real = ", ".join(str(place) for place, i in enumerate(order, 1) if i < count)
    images = "".join(embed(kinds[i][0], f"picture {place}", f"class={kinds[i][1]}") for place, i in enumerate(order, 1))
    columns = -(-2 * count // round((0.8 * count) ** 0.5))
    return (f'<figure class="quiz"><div style="--columns: {columns}">{images}</div><figcaption>{count} of these are '
            f"real held-out images, and {count} are samples. Which?<details><summary>Answer</summary>Real, counted "
            f"along the rows: {real}. Frames mark the samples.</details></figcaption></figure>")


def zoom(found, name, config):
    """Animation into an image of all these folders, towards the centre of the last, the finest window."""
    sources = [(read_image(one.path / name), one.settings["size"],
                one.settings["window"] or [(0, length) for length in one.settings["size"]])
               for one in reversed(found)]
    _, size, window = sources[0]
    centre = [(first + end) / 2 / length for (first, end), length in zip(window, size, strict=True)]
    frames = []
    for i in range(FRAMES):
        side = ZOOM ** (-i / (FRAMES - 1))
        corner = [(point - 0.5 / ZOOM) * (1 - side) / (1 - 1 / ZOOM) for point in centre]
        frames.append(next(frame for source in sources if (frame := _cut(*source, corner, side)) is not None))
    text = f"Zoom into a sample, up to {ZOOM}×; windows were rendered at up to {found[-1].scale(config)}"
    return figure(embed(gif(frames), text, f'width="{FRAME}" height="{FRAME}"', "gif"), text, "zoom")


def _cut(image, size, window, corner, side):
    """A square part of an image of `size` from a window of it, or None if the window does not contain it."""
    (top, left), (rows, columns) = ([point * length - first for point, length, (first, _) in
                                     zip(corner, size, window, strict=True)], [side * length for length in size])
    image = to_pil(image if len(image) == 3 else image[:1])
    box = [left, top, left + columns, top + rows]
    inside = [min(max(0, value), limit) for value, limit in zip(box, 2 * image.size, strict=True)]
    if max(abs(a - b) for a, b in zip(box, inside, strict=True)) > 0.01:
        return None
    return image.resize((FRAME, FRAME), Image.Resampling.LANCZOS, inside)


def scales(found, name, config):
    """Figures of one sample, each beside a held-out image of the same size or, if its file is smaller, enlarged."""
    shown = [(one, image) for one in found if name and (image := _read(one.path / name)) is not None]
    real = None
    for one, _ in reversed(shown):
        with contextlib.suppress(UserError):
            real, _ = heldout_images(config, one.settings["size"], CANDIDATES)
            real = max(real, key=lambda image: image.float().std())
            break
    for one, image in shown:
        text = f"{one.scale(config)}, {_size(one)}: sample"
        content = embed(image, text)
        if real is not None:
            enlarged = real.shape[-1] < image.shape[-1]
            text += " and real image" + (", enlarged: its source has fewer pixels" if enlarged else "")
            content += embed(real if enlarged else _resized(real[None], image.shape[-2:])[0], text)
        yield figure(content, text, "pair")


def samples(found, decoder_config):
    """Samples by resolution."""
    shown = [(one.images(), one.caption("samples", decoder_config)) for one in found]
    return section("Samples", row(*(grid(torch.stack([*images.values()]), caption) for images, caption in shown
                                    if images)))


def classes(found, decoder_config):
    """A row of samples for each class, from the folders that hold several."""
    figures = []
    for one in found:
        names, rows = one.settings.get("classes", []), {}
        for file, image in one.images(MAX_COMPARED * len(set(names))).items() if names else ():
            rows.setdefault(names[int(Path(file).stem) % len(names)], []).append(image)
        length = min(map(len, rows.values()), default=0)
        if len(rows) > 1:
            images = [image for name in sorted(rows) for image in rows[name][:min(length, MAX_SHOWN)]]
            figures.append(grid(torch.stack(images), one.caption(f"{', '.join(sorted(rows))}: samples", decoder_config),
                                columns=min(length, MAX_SHOWN)))
    return section("Samples of each class", row(*figures))


def reconstructions(found, decoder_config):
    """Held-out images, their reconstructions, and scores."""
    parts = []
    for one in found:
        originals, images = GeneratedImages(one.path.parent / "originals", {}).images(), one.images()
        names = [name for name in images if name in originals]
        if names:
            pair = (torch.stack([group[name] for name in names]) for group in (originals, images))
            parts.append(row(*map(grid, pair, ("originals", one.caption("reconstructions", decoder_config)))))
        scores = one.path.parent / "scores.json"
        parts.append(_made_from(scores, _reconstruction_scores, read_json(scores)))
    return section("Reconstructions of held-out images", *filter(None, parts))


def _reconstruction_scores(scores):
    return scores and paragraph(
        f"For {scores['nearest_is_own']} of {scores['count']} reconstructions, their own original is the nearest of "
        f"the {scores['count']} (mean squared error after the mollifier; by chance 1). Mollified PSNR "
        f"{scores['mollified_psnr']:.2f} dB.")


def memorisation(found, config, limit):
    """The nearest training images of some samples, and the distance compared with that of held-out images."""
    if not found or limit == 0:
        return ""
    one = min(found, key=lambda one: abs(one.settings["size"][0] - config.data.img_size))
    images = one.images(MAX_COMPARED)
    if not images:
        return ""
    ours, mollifier = torch.stack([*images.values()]), build_diffusion(config).mollifier
    train_set, heldout = build_dataset(config, train=True), build_dataset(config, train=False)
    unseen, *_ = next(all_batches(Subset(heldout, range(min(MAX_COMPARED, len(heldout)))), MAX_COMPARED))
    both = torch.cat([to_float(_resized(ours, unseen.shape[-2:])), unseen])
    nearest = nearest_images(both, train_set, mollifier, limit=limit, num_workers=config.data.num_workers,
                             device=resolve_device(config.run.device))
    distance, unseen_distance = (part.median().item() for part in
                                 nearest.distance[:, 0].split([len(ours), len(unseen)]))
    strips = []
    for i, name in zip(range(MAX_SHOWN), images, strict=False):
        near = [oriented(train_set[item], train_set.orientations[one])
                for item, one in zip(nearest.item[i].tolist(), nearest.orientation[i].tolist(), strict=True)]
        distances = ", ".join(f"{value:.4f}" for value in nearest.distance[i].tolist())
        strips.append(grid(torch.stack([to_uint8(both[i]), *near]), f"{name}: {distances}", columns=4))
    searched = min(limit, len(train_set))
    return section(
        "Nearest training images",
        paragraph(f"Samples (left in each strip) beside the nearest of {searched} of the {len(train_set)} training "
                  "images in all orientations, with the mean squared difference after the mollifier."),
        row(*strips),
        paragraph(f"Median distance to the nearest training image: {distance:.4f} from {len(ours)} samples, "
                  f"{unseen_distance:.4f} from {len(unseen)} held-out images. Copies would be far nearer than held-out "
                  "images are; smooth samples are somewhat nearer without being copies.", note=True))


def find_applications(folders, config):
    """{folder: content of scores.json} written by super_resolution.py, inpaint.py and interpolate.py with an
    autoencoder of this run: the folder inpainting/a_b_centre belongs to the run a_b, not to a."""
    found = {path: read_json(path / "scores.json") for path in folders}
    return {path: record for path, record in found.items() if _belongs_to(config, record.get("settings"))}


def _belongs_to(config, settings):
    return (isinstance(settings, dict) and {"decoder", "steps", "size"} <= settings.keys()
            and settings.get("experiment") == config.run.experiment)


def applications(found, config):
    """Grids and scores of each application."""
    return section("Applications", *filter(None, (_made_from(path, _application, path, record, config)
                                                  for path, record in found.items())))


def _application(path, record, config):
    values = dict(record)
    settings, methods = values.pop("settings"), values.pop("methods", None)
    caption = f"{path}, {settings['steps']} steps{_warning(settings['decoder'], config)}"
    pictures = [_made_from(file, picture, file, f"{caption}: {file.stem}") for file in sorted(path.glob("*.png"))]
    parts = [row(*filter(None, pictures))]
    if methods:
        names = dict.fromkeys(name for scores in methods.values() for name in scores)
        parts.append(table([("method", *map(_words, names)), *(
            (method, *(_number(scores.get(name)) for name in names)) for method, scores in methods.items())]))
    parts.append(paragraph(" · ".join(f"{_words(name)} {_number(value)}" for name, value in values.items())))
    return "".join(parts)


def _words(name):
    return name.replace("_", " ")


def _number(value):
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def scores(records):
    """A row for each JSON file of calculate_fid.py, and the protocol of each."""
    if not records:
        return ""
    rows, notes = [("", "score", "value", "KID", "precision", "recall")], []
    for record in sorted(records, key=lambda record: (str(record["score"]), record["value"])):
        rows.append((record["samples"], record["score"], f"{record['value']:.2f}",
                     f"{record['kid']:.4f} ± {record['kid_standard_error']:.4f}", f"{record['precision']:.3f}",
                     f"{record['recall']:.3f}"))
        notes.append(paragraph(f"Protocol of {record['samples']}: {fid.describe(record)}.", note=True))
    return section("Scores", table(rows), *notes)


def losses(configs):
    """Plots of losses over steps."""
    plots = {}
    for config in configs:
        lines = read_metrics(run_dir(config) / "metrics.jsonl")

        def points(name, lines=lines):
            return [(line["step"], line[name]) for line in lines if name in line]

        plots[config.run.experiment] = {
            "training": points("loss"), "held out (EMA)": points("validation_loss"),
            "held out (raw weights)": points("raw_validation_loss")}
        plots[f"{config.run.experiment}, held out, from least to most noise"] = {
            f"quarter {i} of the chain": points(f"validation_loss_q{i}") for i in range(1, 5)}
    drawn = {title: to_bytes(line_plot(series, title, "step", "loss", log=True), "svg")
             for title, series in plots.items() if any(series.values())}
    return section("Losses", row(*(embed(content, title, "class=plot", "svg+xml") for title, content in drawn.items())))


def config_changes(configs_and_defaults):
    """Fields of each run's config.json that differ from the defaults."""
    parts = []
    for config, defaults in configs_and_defaults:
        values = read_json(run_dir(config) / "config.json") or config.to_dict()
        changes = [(name, *(tuple(value) if isinstance(value, list) else value for value in pair))
                   for name, *pair in changed_fields(values, defaults)]
        parts.append(table([(f"field of {config.run.experiment}", "default", "this run"), *changes]))
    return section("Config, where it differs from the defaults", row(*parts))


def environments(configs):
    """Commit, packages and machine of each checkpoint and of this page."""
    found = {}
    for config in configs:
        kind, path = ("autoencoder", autoencoder_path) if "mc_integral" in config else ("latent", latent_path)
        if path(config).is_file():
            found[config.run.experiment] = load_trained(path(config), kind, config).get("environment", {})
    found["this page"] = environment()
    rows = [("", *found)]
    for name in ("commit", "python", "machine"):
        rows.append((name, *(one.get(name) or "unknown" for one in found.values())))
    for package in sorted({package for one in found.values() for package in one.get("packages", {})}):
        rows.append((package, *(one.get("packages", {}).get(package, "-") for one in found.values())))
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return section("Environment", table(rows, wrap=True), paragraph(f"This page was made at {now}.", note=True))


def save_pictures(folder, samples, reconstructions, suites):
    """Write demo.png, a grid of reconstructions and samples, and cost.png, the cost of a training step beside one
    sample at its smallest and largest size.

    suites   those of a file that benchmark.py has written; without the suite training there is no cost.png
    """
    if not samples:
        raise UserError(f"--pictures={folder} needs samples; write some by generate_samples.py")
    columns = {"sample, " + _size(one): one for one in samples[:SCALES]}
    for one in reconstructions[:1]:
        originals = GeneratedImages(one.path.parent / "originals", {})
        columns = {"held-out image": originals, "its reconstruction": one, **columns}
    save_grid({label: [*one.images(ROWS).values()] for label, one in columns.items()}, folder / "demo.png")
    if "training" in suites:
        ends = samples[0], samples[-1]
        name = _most_contrast(ends)
        images = {f"sample, {_size(one)}": read_image(one.path / name) for one in ends}
        with replacing(folder / "cost.png") as temporary:
            temporary.write_bytes(to_bytes(cost_plot(suites["training"], images), "png"))
