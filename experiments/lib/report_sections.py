"""The sections of report.py, each from what a run or another script has left on disk; "" where it has left nothing."""

import datetime
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Subset

from data.datasets import build_dataset
from data.images import read_image
from data.loader import all_batches, to_float
from diffusion.gaussian_diffusion import build_diffusion
from experiments.lib import html_report as page
from experiments.lib.plots import line_plot, to_bytes
from experiments.metrics import fid
from experiments.metrics.images import nearest_images
from models.load import autoencoder_path, latent_path, load_trained
from utils.checkpoint import identity
from utils.config import changed_fields, run_dir
from utils.device import environment, resolve_device
from utils.files import read_json
from utils.images import to_uint8
from utils.logging import read_metrics, training_seconds

CHECKED = 64  # samples, and held-out images, whose nearest training images are looked for
SHOWN = 8  # of these samples


class Made(NamedTuple):
    """A folder of images and how they were made (its settings.json)."""

    path: Path
    settings: dict

    def images(self, count=64):
        """The first images by name, uint8 [N, C, H, W]."""
        return torch.stack([read_image(file) for file in sorted(self.path.glob("*.png"))[:count]])

    def caption(self, what, decoder_config):
        """What the images are, with a warning where the model has changed since."""
        made = self.settings
        height, width = made["size"]
        scales = dict.fromkeys(f"{length / decoder_config.data.img_size:g}×" for length in (height, width))
        text = f"{what} of {height}x{width} ({' and '.join(scales)}), {made['steps']} steps of {made['sampler']}"
        return text + _warning(made["decoder"], decoder_config)


def _warning(decoder, config):
    """For a caption, where `decoder`, which made the images (utils.checkpoint.identity), is not that of the run now."""
    path = autoencoder_path(config)
    return "" if path.is_file() and decoder == identity(path) else "; MADE BY ANOTHER CHECKPOINT than that of this run"


def find_made(folders):
    """(samples by size, reconstructions by size): the Made of all given folders that hold images of a model."""
    found = [Made(path, read_json(path / "settings.json")) for path in folders if any(path.glob("*.png"))]
    found = sorted((made for made in found if {"decoder", "size", "sampler", "steps"} <= set(made.settings)),
                   key=lambda made: made.settings["size"])
    return ([made for made in found if "latent_model" in made.settings],
            [made for made in found if any((made.path.parent / "originals").glob("*.png"))])


def progress(configs):
    """How far each run has come."""
    lines = []
    for config in configs:
        metrics = read_metrics(run_dir(config) / "metrics.jsonl")
        if not metrics:
            lines.append(f"{config.run.experiment}: weights alone, without the record of their training")
            continue
        losses = [line["validation_loss"] for line in metrics if "validation_loss" in line]
        loss = f", held-out loss {losses[-1]:.4g}" if losses else ""
        steps = max((line["step"] for line in metrics), default=0)
        lines.append(f"{config.run.experiment}: {steps} steps in {training_seconds(metrics):.0f} s{loss}")
    return page.paragraph(" · ".join(lines))


def pictures(configs, size):
    """Sheets of images of size² that training has left, the last of each kind; of wide ones the left end."""
    sheets = []
    for config in configs:
        last = {path.stem.rpartition("_")[0]: path for path in sorted((run_dir(config) / "images").glob("*.png"))}
        for name, path in last.items():
            image = read_image(path)[:, :, :16 * size]
            sheets.append(page.sheet(image[None], f"{name} of {config.run.experiment}, step "
                                     f"{int(path.stem.rpartition('_')[2])}", scale=2 if size <= 32 else 1))
    return page.section("While training", page.row(*sheets) if sheets else "")


def samples(made, decoder_config):
    """Samples by resolution."""
    sheets = [page.sheet(one.images(), one.caption("samples", decoder_config)) for one in made]
    return page.section("Samples", page.row(*sheets) if sheets else "")


def reconstructions(made, decoder_config):
    """Held-out images, decoded again, and how close they are."""
    parts = []
    for one in made:
        originals, scores = Made(one.path.parent / "originals", {}), read_json(one.path.parent / "scores.json")
        parts.append(page.row(page.sheet(originals.images(), "originals"),
                              page.sheet(one.images(), one.caption("reconstructions", decoder_config))))
        if scores:
            parts.append(page.paragraph(
                f"{scores['nearest_is_own']} of {scores['count']} reconstructions have their own original as the "
                f"nearest of the {scores['count']} (mean squared error after the mollifier; by chance 1). Mollified "
                f"PSNR {scores['mollified_psnr']:.2f} dB."))
    return page.section("Reconstructions of held-out images", *parts)


def memorisation(made, config, limit):
    """The nearest training images of some samples, and how much nearer they are than those of held-out images."""
    if not made or limit == 0:
        return ""
    train_set, heldout = build_dataset(config, train=True), build_dataset(config, train=False)
    one = min(made, key=lambda one: abs(one.settings["size"][0] - config.data.img_size))
    shown, mollifier = one.images(CHECKED), build_diffusion(config).mollifier
    unseen, _ = next(all_batches(Subset(heldout, range(min(CHECKED, len(heldout)))), CHECKED))
    both = torch.cat([torch.nn.functional.interpolate(to_float(shown), unseen.shape[-2:], mode="bilinear",
                                                      antialias=True), unseen])
    found = nearest_images(both, train_set, mollifier, limit=limit, num_workers=config.data.num_workers,
                           device=resolve_device(config.run.device))
    ours, theirs = (part.median().item() for part in found.distance[:, 0].split([len(shown), len(unseen)]))
    strips = []
    for i in range(min(SHOWN, len(shown))):
        near = [train_set[item].flip(-1) if mirrored else train_set[item]
                for item, mirrored in zip(found.item[i].tolist(), found.mirrored[i].tolist(), strict=True)]
        strips.append(page.sheet(torch.stack([to_uint8(both[i]), *near]), f"{i:05d}.png: "
                                 + ", ".join(f"{value:.4f}" for value in found.distance[i].tolist()), columns=4))
    searched = min(limit, len(train_set))
    return page.section(
        "Nearest training images",
        page.paragraph(f"Samples (left in each strip) beside the nearest of {searched} of the {len(train_set)} "
                       "training images and their mirror images, and the mean squared difference after the mollifier."),
        page.row(*strips),
        page.paragraph(f"Median distance to the nearest training image: {ours:.4f} from {len(shown)} samples, "
                       f"{theirs:.4f} from {len(unseen)} held-out images. Copies would be far nearer than unseen "
                       "images are; smooth samples are somewhat nearer without being copies.", note=True))


def find_applications(folders, config):
    """{folder: what its scores.json holds} of what super_resolution.py, inpaint.py and interpolate.py have made with an
    autoencoder of the name of this one; the folder inpainting/a_b_centre is of a_b, and not of a."""
    found = {path: read_json(path / "scores.json") for path in folders}
    return {path: record for path, record in found.items() if _is_of_run(record.get("settings"), config)}


def _is_of_run(settings, config):
    """Whether these are settings of such a script, of a decoder that lies in a folder of the run's name."""
    if not isinstance(settings, dict) or not {"decoder", "steps", "size"} <= settings.keys():
        return False
    return Path(str(settings["decoder"]).rsplit(" ", 2)[0]).parent.name == run_dir(config).name


def applications(found, config):
    """The sheets of each, and its figures."""
    parts = []
    for path, record in found.items():
        figures = dict(record)
        settings = figures.pop("settings")
        caption = f"{path}, {settings['steps']} steps{_warning(settings['decoder'], config)}"
        sheets = [page.picture(file, f"{caption}: {file.stem}") for file in sorted(path.glob("*.png"))]
        parts.append(page.row(*sheets))
        methods = figures.pop("methods", None)
        if methods:
            names = dict.fromkeys(name for values in methods.values() for name in values)
            parts.append(page.table([("method", *map(_words, names)), *(
                (method, *(_number(values.get(name)) for name in names)) for method, values in methods.items())]))
        parts.append(page.paragraph(" · ".join(f"{_words(name)} {_number(value)}" for name, value in figures.items())))
    return page.section("Applications", *parts)


def _words(name):
    return name.replace("_", " ")


def _number(value):
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def scores(records):
    """What calculate_fid.py found, one row for each of its JSON files, and what was compared."""
    if not records:
        return ""
    rows, notes = [("", "score", "value", "KID", "precision", "recall")], []
    for record in sorted(records, key=lambda record: (record["score"], record["value"])):
        rows.append((record["samples"], record["score"], f"{record['value']:.2f}",
                     f"{record['kid']:.4f} ± {record['kid_standard_error']:.4f}", f"{record['precision']:.3f}",
                     f"{record['recall']:.3f}"))
        notes.append(page.paragraph(f"Protocol of {record['samples']}: {fid.describe(record)}.", note=True))
    return page.section("Scores", page.table(rows), *notes)


def curves(configs):
    """Losses over steps."""
    plots = []
    for config in configs:
        lines = read_metrics(run_dir(config) / "metrics.jsonl")

        def points(name, lines=lines):
            return [(line["step"], line[name]) for line in lines if name in line]

        series = {"training": points("loss"), "held out (EMA)": points("validation_loss"),
                  "held out (raw weights)": points("raw_validation_loss")}
        if any(series.values()):
            plots.append((config.run.experiment, series))
        quarters = {f"quarter {i} of the chain": points(f"validation_loss_q{i}") for i in range(1, 5)}
        if any(quarters.values()):
            plots.append((f"{config.run.experiment}, held out, from least noise to most", quarters))
    drawn = [(title, to_bytes(line_plot(series, title, "step", "loss", log=True), "svg")) for title, series in plots]
    return page.section("Losses", page.row(*(
        page.embed(content, "svg+xml", title, 'class="plot"') for title, content in drawn)) if drawn else "")


def config_changes(configs_and_defaults):
    """Fields of each config that differ from the defaults, as config.json says the run was trained."""
    parts = []
    for config, defaults in configs_and_defaults:
        changes = [(name, *(tuple(value) if isinstance(value, list) else value for value in pair)) for name, *pair in
                   changed_fields(read_json(run_dir(config) / "config.json") or config.to_dict(), defaults)]
        parts.append(page.table([(f"field of {config.run.experiment}", "default", "this run"), *changes]))
    return page.section("Config, where it differs from the defaults", page.row(*parts))


def times(configs, made):
    """Seconds of training and of making images."""
    rows = [("what", "seconds")]
    for config in configs:
        seconds = training_seconds(read_metrics(run_dir(config) / "metrics.jsonl"))
        rows.append((f"training {config.run.experiment}", f"{seconds:.0f}"))
    for one in made:
        count, size = len(list(one.path.glob("*.png"))), "x".join(map(str, one.settings["size"]))
        rows.append((f"{one.path}: {count} images of {size}", f"{one.settings['seconds']:.0f}"))
    return page.section("Time", page.table(rows))


def origin(configs):
    """What code, packages and machine the weights come from, and this page."""
    made = {}
    for config in configs:
        kind, path = ("autoencoder", autoencoder_path) if "mc_integral" in config else ("latent", latent_path)
        if path(config).is_file():
            made[config.run.experiment] = load_trained(path(config), kind, config).get("environment", {})
    made["this page"] = environment()
    rows = [("", *made)]
    for name in ("commit", "python", "machine"):
        rows.append((name, *(one.get(name) or "unknown" for one in made.values())))
    for package in sorted({package for one in made.values() for package in one.get("packages", {})}):
        rows.append((package, *(one.get("packages", {}).get(package, "-") for one in made.values())))
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return page.section("Environment", page.table(rows, wrap=True),
                        page.paragraph(f"This page was made at {now}.", note=True))
