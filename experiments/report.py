"""One self-contained HTML page about a run: samples, reconstructions, copies, scores, curves, config, environment.

    python experiments/report.py --config configs/ffhq_256_config.py
    python experiments/report.py --config configs/ffhq_latent_config.py --decoder_config configs/ffhq_256_config.py

It shows what is there: the metrics and pictures of the runs, and images and JSON files that the other scripts have left
in samples/, reconstructions/, super_resolution/, inpainting/ and interpolation/ under the name of the run or, with
--folder, in that folder and those below it.
"""

import html
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.defaults import autoencoder_config, latent_config
from data.datasets import build_dataset
from experiments.lib import html_report as page
from experiments.lib import report_sections as sections
from models.load import autoencoder_path, latent_path
from utils import cli, config
from utils.errors import UserError
from utils.files import check_output_file, read_json, replacing

CONFIG = config.define_config_flag("config", "latent config, or that of an autoencoder alone")
DECODER_CONFIG = config.define_config_flag("decoder_config", "config of the autoencoder of a latent --config")
FOLDER = flags.DEFINE_string("folder", None, "where images and scores of the run are; default: where scripts put them")
SEARCH = flags.DEFINE_integer("search", 20_000, "training images among which copies are looked for; 0: none",
                              lower_bound=0)
OUTPUT = flags.DEFINE_string("output", None, "the page to write; default: report.html in the folder of the run")
TEMPLATE = Path(__file__).parent / "lib" / "report_template.html"


def main():
    check_output_file(OUTPUT.value, "output")
    latent, autoencoder = config.read_trained_stages(CONFIG, DECODER_CONFIG)
    if autoencoder is None:
        raise UserError("the config of an autoencoder is missing; give it as --config, or as --decoder_config where "
                        "--config is a latent one")
    runs = [run for run in (autoencoder, latent) if run is not None]
    for run in runs:
        path = latent_path(run) if run is latent else autoencoder_path(run)
        if not path.is_file() and not (config.run_dir(run) / "metrics.jsonl").is_file():
            raise UserError(f"there is no run in {config.run_dir(run)}; train it first, or set run.output_dir and "
                            "run.experiment to those of the training run")
    folders = image_folders(autoencoder, latent)
    made, recons = sections.find_made(folders)
    applied = sections.find_applications(folders, autoencoder)
    records = [found for folder in folders for path in sorted(folder.glob("*.json"))
               if "kid" in (found := read_json(path))]
    defaults = [latent_config() if run is latent else autoencoder_config(run.data.img_size) for run in runs]
    body = "".join([
        summary(autoencoder, latent), sections.progress(runs), sections.samples(made, autoencoder),
        sections.reconstructions(recons, autoencoder), sections.memorisation(made, autoencoder, SEARCH.value),
        sections.applications(applied, autoencoder), sections.scores(records),
        sections.pictures(runs, autoencoder.data.img_size), sections.curves(runs),
        sections.config_changes(zip(runs, defaults, strict=True)), sections.times(runs, made + recons),
        sections.origin(runs)])
    output = Path(OUTPUT.value or config.run_dir(runs[-1]) / "report.html")
    with replacing(output) as temporary:
        temporary.write_text(string.Template(TEMPLATE.read_text()).substitute(
            title=html.escape("∞-Diff: " + " and ".join(run.run.experiment for run in runs)), body=body))
    print(f"report: {len(made)} folders of samples, {len(recons)} of reconstructions, {len(applied)} of applications, "
          f"{len(records)} scores; open {output.resolve().as_uri()}")


def image_folders(autoencoder, latent):
    """Folders that may hold images or scores of the run."""
    if FOLDER.value is not None:
        root = Path(FOLDER.value)
        if not root.is_dir():
            raise UserError(f"--folder={FOLDER.value} is not a folder; give the one that the other scripts wrote to")
        return [root, *sorted(path for pattern in ("*/", "*/*/") for path in root.glob(pattern))]
    size = "[0-9]*x[0-9]*"
    samples = Path("samples").glob(f"{latent.run.experiment}_{size}") if latent is not None else []
    name = autoencoder.run.experiment
    others = [("reconstructions", f"{name}_{size}/reconstructions"), ("super_resolution", f"{name}_{size}"),
              ("inpainting", f"{name}_*"), ("interpolation", name)]
    return sorted([*samples, *(path for folder, pattern in others for path in Path(folder).glob(pattern))])


def summary(autoencoder, latent):
    """What the page is about."""
    size, points = autoencoder.data.img_size, autoencoder.mc_integral.q_sample
    text = f"A mollified diffusion autoencoder, trained on {points} of the {size * size} pixels of each {size}² image"
    if latent is not None:
        text += ", and a small diffusion model over its latents"
    return page.paragraph(text + ".") + page.paragraph(
        " · ".join(build_dataset(autoencoder, train).describe() for train in (True, False)), note=True)


if __name__ == "__main__":
    cli.run(main)
