"""One self-contained HTML page about a trained pair of models: curves, reconstructions, samples, scores, times.

    python experiments/report.py --config configs/demo_latent_config.py --decoder_config configs/demo_config.py \
        --folder demo --output report.html

Reads the metrics of both runs and, below --folder, what the other scripts wrote: recons/ (generate_recons.py),
samples_1x/, samples_2x/, samples_4x/ (generate_samples.py), and samples_scores.json and noise_scores.json
(calculate_fid.py, of samples_1x/ and of the images of generate_noise.py).
"""

import base64
import html
import io
import json
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import torch
from absl import flags

from data.datasets import build_dataset
from utils import cli, config
from utils.errors import UserError
from utils.images import read_image, tile, to_pil
from utils.logging import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIG = config.define_config_flag("config", "latent config")
DECODER_CONFIG = config.define_config_flag("decoder_config", "config of the autoencoder")
FOLDER = flags.DEFINE_string("folder", "demo", "folder with recons/ and samples_*x/")
OUTPUT = flags.DEFINE_string("output", "report.html", "the page to write")
TEMPLATE = Path(__file__).with_name("report_template.html")


def load_pngs(folder):
    """uint8 [N, C, H, W] of all PNGs of a folder, by name."""
    files = sorted(folder.glob("*.png"))
    if not files:
        raise UserError(f"--folder: {folder} has no images; run the sampling scripts first (see make demo)")
    return torch.stack([read_image(file) for file in files])


def load_json(path):
    """What a JSON file of another script holds."""
    if not path.is_file():
        raise UserError(f"--folder: there is no {path}; run the sampling scripts first (see make demo)")
    return json.loads(path.read_text())


def curves(folder, title):
    """A plot of the losses of a run, as an <img>."""
    lines = read_metrics(folder / "metrics.jsonl")
    figure, axes = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    for name, label in (("loss", "training"), ("validation_loss", "held out")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return embed(buffer.getvalue(), title, 'class="plot"')


def picture(images, columns, scale, alt):
    """A sheet of uint8 images [N, C, H, W], each pixel shown `scale` times as large, as an <img>."""
    buffer = io.BytesIO()
    sheet = to_pil(tile(images, columns))
    sheet.save(buffer, format="PNG")
    return embed(buffer.getvalue(), alt, f'width="{sheet.width * scale}" height="{sheet.height * scale}"')


def embed(png, alt, attributes):
    """An <img> that holds the bytes of a PNG."""
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" {attributes}>'


def table(rows):
    """Rows of cells as an HTML table; the first row is the heading."""
    cells = [["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)] for tag, row in
             [("th", rows[0]), *(("td", row) for row in rows[1:])]]
    return "<table>" + "".join(f"<tr>{row[0]}</tr>" for row in cells) + "</table>"


def score_row(label, scores):
    """A row of the table of scores, from what calculate_fid.py wrote."""
    return label, f"{scores['kid']:.4f}", f"{scores['kid_standard_error']:.4f}", f"{scores['value']:.1f}"


def seconds(metrics):
    """Training time of a run: each start of it counts its own seconds from zero."""
    total = last = 0.0
    for line in metrics:
        if "seconds" in line:
            total += line["seconds"] - last if line["seconds"] >= last else line["seconds"]
            last = line["seconds"]
    return total


def main():
    cfg, decoder_cfg = config.read_latent_config(CONFIG), config.read_autoencoder_config(DECODER_CONFIG)
    folder = Path(FOLDER.value)
    originals, recons = load_pngs(folder / "recons" / "originals"), load_pngs(folder / "recons" / "reconstructions")
    samples = {scale: load_pngs(folder / f"samples_{scale}x") for scale in (1, 2, 4)}
    closeness = load_json(folder / "recons" / "scores.json")

    heldout = build_dataset(decoder_cfg, train=False)
    scores = {name: load_json(folder / f"{name}_scores.json") for name in ("samples", "noise")}
    times = [("step", "seconds")]
    for title, run in (("training the autoencoder", decoder_cfg), ("training the latent model", cfg)):
        times.append((title, f"{seconds(read_metrics(config.run_dir(run) / 'metrics.jsonl')):.0f}"))
    for what, name, images in (("reconstructions", "recons/reconstructions", recons),
                               *(("samples", f"samples_{scale}x", samples[scale]) for scale in samples)):
        made = load_json(folder / name / "settings.json")
        times.append((f"{len(images)} {what} of {made['size'][0]}x{made['size'][1]}, {made['steps']} steps of "
                      f"{made['sampler']}", f"{made['seconds']:.0f}"))

    page = string.Template(TEMPLATE.read_text()).substitute(
        title=html.escape(decoder_cfg.run.experiment), q_sample=decoder_cfg.mc_integral.q_sample,
        pixels=decoder_cfg.data.img_size ** 2, size=decoder_cfg.data.img_size, data=html.escape(heldout.describe()),
        own=closeness["nearest_is_own"], count=closeness["count"], psnr=f"{closeness['mollified_psnr']:.1f}",
        originals=picture(originals[:64], 8, 2, "originals"), recons=picture(recons[:64], 8, 2, "reconstructions"),
        samples_1x=picture(samples[1][:64], 8, 2, "samples"), size_1x=samples[1].shape[-1],
        samples_2x=picture(samples[2][:16], 4, 2, "samples at twice the resolution"), size_2x=samples[2].shape[-1],
        samples_4x=picture(samples[4][:16], 4, 2, "samples at 4 times the resolution"), size_4x=samples[4].shape[-1],
        scores=table([("", "KID", "standard error", scores["samples"]["score"]),
                      score_row(f"{len(samples[1])} samples", scores["samples"]),
                      score_row("mollified noise of the same mean and variance", scores["noise"])]),
        heldout=len(heldout), features=scores["samples"]["feature_model"],
        ratio=f"{scores['samples']['kid'] / scores['noise']['kid']:.2f}",
        curves=curves(config.run_dir(decoder_cfg), "autoencoder") + curves(config.run_dir(cfg), "latent model"),
        times=table(times))
    output = Path(OUTPUT.value)
    output.write_text(page)
    print(f"KID of the samples {scores['samples']['kid']:.4f}, of noise {scores['noise']['kid']:.4f}; "
          f"{closeness['nearest_is_own']} of {closeness['count']} reconstructions nearest to their own original")
    print(f"open {output.resolve().as_uri()}")


if __name__ == "__main__":
    cli.run(main)
