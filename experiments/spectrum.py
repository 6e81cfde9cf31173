"""Compare the power spectrum of samples with that of the held-out images of a data set, at any resolutions.

    python experiments/spectrum.py --config configs/random_fields_config.py --samples fields_1x,fields_2x,fields_4x

Each folder holds samples of one size, made by generate_samples.py; the true images, as many, are made or read at that
size. Samples come out of the mollified process and the Wiener filter, which together keep G²/(G² + ε²) of every
coefficient (G: the factor of T); so do the true images here, and the comparison ends where less than half is kept.
Writes spectrum.png and spectrum.json, and prints the mean of |log10(generated / true power)| over the wavenumbers,
beside the same for as many other true images: what sampling error alone amounts to.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from data.loader import to_float
from diffusion.gaussian_diffusion import build_diffusion
from experiments.lib.image_folders import SampleFolder, heldout_images
from experiments.lib.plots import line_plot, to_bytes
from experiments.metrics.images import log_ratio, radial_spectrum
from utils import cli, config
from utils.errors import UserError
from utils.files import check_writable, replacing
from utils.images import to_uint8

CONFIG = config.define_config_flag("config", "autoencoder config, for its data set and mollifier")
SAMPLES = flags.DEFINE_list("samples", [], "folders of samples, separated by commas")
OUTPUT = flags.DEFINE_string("output", "spectrum", "folder for spectrum.png and spectrum.json")


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    if not SAMPLES.value:
        raise UserError("--samples is missing; give folders that generate_samples.py made, separated by commas")
    output = Path(OUTPUT.value)
    check_writable(output, f"--output={output}")
    mollifier = build_diffusion(cfg).mollifier
    folders = [SampleFolder(name) for name in SAMPLES.value]
    rows = [compare(folder, cfg, mollifier) for folder in folders]

    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "spectrum.json") as temporary:
        temporary.write_text(json.dumps({"wavenumbers": [1, resolved(mollifier)], "sizes": rows}) + "\n")
    with replacing(output / "spectrum.png") as temporary:
        temporary.write_bytes(plot(rows, resolved(mollifier)))
    for row in rows:
        print("{0}x{1}, {count} samples: mean |log10 ratio| to the true spectrum {distance:.3f} (as many other true "
              "images: {distance_of_true:.3f}), mean log10 ratio {bias:+.3f}".format(*row["size"], **row))
    print(f"over the wavenumbers 1 to {resolved(mollifier)}; plot in {output}")


def compare(folder, cfg, mollifier):
    """What the samples of a folder, and the true images of their size, have for a spectrum: plain data."""
    count, size, band = len(folder), folder.size, resolved(mollifier)
    if min(size) <= band:
        raise UserError(f"--samples={folder.folder} are of {size[0]}x{size[1]}, fewer pixels than the {band} "
                        "wavenumbers to compare; give samples of at least data.img_size")
    images, _ = heldout_images(cfg, size, 2 * count)
    if len(images) < 2 * count:
        raise UserError(f"--samples={folder.folder} holds {count} images, and twice as many are needed that are held "
                        f"out, of which there are {len(images)}; set data.num_heldout_functions, or give fewer samples")
    exact = to_float(images)
    seen = to_float(to_uint8(mollifier.sharpen(mollifier.blur(exact)).clamp(-1, 1)))
    samples = torch.stack([folder[i][:cfg.data.channels] for i in range(count)])
    generated, true, other = (radial_spectrum(part) for part in (to_float(samples), seen[:count], seen[count:]))
    distance, bias = log_ratio(generated, true, band)
    spectra = {"generated": generated, "true": true, "true_unfiltered": radial_spectrum(exact)}
    return {"samples": str(folder.folder), "size": list(size), "count": count, "made": folder.settings,
            "distance": distance, "bias": bias, "distance_of_true": log_ratio(other, true, band)[0],
            "spectra": {name: values.tolist() for name, values in spectra.items()}}


def resolved(mollifier):
    """The largest wavenumber at which T and the Wiener filter keep half of a coefficient, where G = ε.

    With G(k) = exp(−(π²σ²/2) k²/R²) that is k = √(2 ln(1/ε)) R/(πσ), of those that R pixels have.
    """
    height, width = mollifier.train_size
    nyquist = min(height, width) - 1
    if mollifier.is_identity:
        return nyquist
    return min(nyquist, int(math.sqrt(-2 * math.log(mollifier.wiener_eps)) * min(height, width)
                            / (math.pi * mollifier.sigma)))


def plot(rows, band):
    """A PNG of all spectra over the wavenumbers up to twice those that are compared."""
    def points(values):
        return list(enumerate(values))[1:2 * band]

    finest = max(rows, key=lambda row: min(row["size"]))["spectra"]
    curves = {"true": points(finest["true_unfiltered"]), "true, after T and Wiener": points(finest["true"])}
    curves |= {"samples, {}x{}".format(*row["size"]): points(row["spectra"]["generated"]) for row in rows}
    return to_bytes(line_plot(curves, f"power spectrum (compared: wavenumbers 1 to {band})", "wavenumber (half waves "
                              "per side)", "mean square of a coefficient", log=True), "png")


if __name__ == "__main__":
    cli.run(main)
