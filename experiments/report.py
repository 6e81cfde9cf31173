"""Make one self-contained HTML page about a run: samples, reconstructions, copies, scores, losses, config, environment.

    python experiments/report.py --config configs/ffhq_256_config.py
    python experiments/report.py --config configs/ffhq_latent_config.py --decoder_config configs/ffhq_256_config.py

The page shows the metrics and images of the runs, and images and scores that other scripts have written: in samples/,
reconstructions/, super_resolution/, inpainting/ and interpolation/ under the name of the run or, with --folder, in that
folder and two levels below it.
"""

import html
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.defaults import autoencoder_config, latent_config
from data.datasets import build_dataset
from experiments.lib import report_sections
from experiments.lib.html_report import paragraph
from experiments.metrics import fid
from models.load import autoencoder_path, latent_path
from utils import cli, config
from utils.errors import UserError
from utils.files import check_output_file, read_json, replacing

CONFIG = config.define_config_flag("config", "latent config, or config of an autoencoder alone")
DECODER_CONFIG = config.define_config_flag("decoder_config", "config of the autoencoder of a latent --config")
FOLDER = flags.DEFINE_string("folder", None, "folder with images and scores of the run; default: where scripts write")
SEARCH = flags.DEFINE_integer("search", 20_000, "number of training images to search for copies; 0: none",
                              lower_bound=0)
PICTURES = flags.DEFINE_string("pictures", None, "also write demo.png to this folder and, if --folder has a "
                               "benchmark.json of benchmark.py, cost.png")
OUTPUT = flags.DEFINE_string("output", None, "the page; default: report.html in the folder of the run")
TEMPLATE = Path(__file__).parent / "lib" / "report_template.html"


def main():
    latent, autoencoder = config.read_trained_stages(CONFIG, DECODER_CONFIG)
    if autoencoder is None:
        raise UserError("the config of an autoencoder is missing; give it as --config, or as --decoder_config beside a "
                        "latent --config")
    runs = [run for run in (autoencoder, latent) if run is not None]
    for run in runs:
        path = latent_path(run) if run is latent else autoencoder_path(run)
        if not path.is_file() and not (config.run_dir(run) / "metrics.jsonl").is_file():
            raise UserError(f"there is no run in {config.run_dir(run)}; train it first, or set run.output_dir and "
                            "run.experiment to those of the training run")
    output = Path(OUTPUT.value or config.run_dir(runs[-1]) / "report.html")
    check_output_file(output, "output")
    folders = find_folders(autoencoder, latent)
    samples, windows, reconstructions = report_sections.find_images(folders)
    applications = report_sections.find_applications(folders, autoencoder)
    suites = read_json(Path(FOLDER.value or ".") / "benchmark.json").get("suites", {})
    scores = [record for folder in folders for path in sorted(folder.glob("*.json"))
              if (record := fid.read_record(path))]
    defaults = [latent_config() if run is latent else autoencoder_config(run.data.img_size) for run in runs]
    body = "".join([
        summary(autoencoder, latent),
        report_sections.progress(runs),
        report_sections.first_screen(samples, windows, autoencoder),
        report_sections.reconstructions(reconstructions, autoencoder),
        report_sections.scores(scores),
        report_sections.losses(runs),
        report_sections.samples(samples, autoencoder),
        report_sections.classes(samples, autoencoder),
        report_sections.memorisation(samples, autoencoder, SEARCH.value),
        report_sections.applications(applications, autoencoder),
        report_sections.training_images(runs, autoencoder.data.img_size),
        report_sections.config_changes(zip(runs, defaults, strict=True)),
        report_sections.environments(runs)])
    page = string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape("∞-Diff: " + " and ".join(run.run.experiment for run in runs)), body=body)
    with replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # file names may not be UTF-8
    if PICTURES.value:
        report_sections.save_pictures(Path(PICTURES.value), samples, reconstructions, suites)
    print(f"report: {len(samples)} folders of samples, {len(reconstructions)} of reconstructions, {len(applications)} "
          f"of applications, {len(scores)} scores; open {output.resolve().as_uri()}")


def find_folders(autoencoder, latent):
    """Folders that may hold images or scores of the run."""
    if FOLDER.value is not None:
        root = Path(FOLDER.value)
        if not root.is_dir():
            raise UserError(f"--folder={FOLDER.value} is not a folder; give the folder that other scripts wrote to")
        return [root, *sorted(path for pattern in ("*/", "*/*/") for path in root.glob(pattern))]
    size = "[0-9]*x[0-9]*"
    samples = Path("samples").glob(f"{latent.run.experiment}_{size}") if latent is not None else []
    name = autoencoder.run.experiment
    others = [("reconstructions", f"{name}_{size}/reconstructions"), ("super_resolution", f"{name}_{size}"),
              ("inpainting", f"{name}_*"), ("interpolation", name)]
    return sorted([*samples, *(path for folder, pattern in others for path in Path(folder).glob(pattern))])


def summary(autoencoder, latent):
    """The subject of the page."""
    size, points = autoencoder.data.img_size, autoencoder.mc_integral.q_sample
    text = f"A mollified diffusion autoencoder, trained on {points} of the {size * size} pixels of each {size}² image"
    if latent is not None:
        text += ", and a small diffusion model over its latents"
    return paragraph(text + ". " + " · ".join(build_dataset(autoencoder, train).describe() for train in (True, False)))


if __name__ == "__main__":
    cli.run(main)
