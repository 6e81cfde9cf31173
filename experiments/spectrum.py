"""Compare the power spectrum of samples with that of the held-out images of a data set, at any resolutions.

    python experiments/spectrum.py --config configs/random_fields_config.py --samples fields_1x,fields_2x,fields_4x

Each folder holds samples of one size from generate_samples.py; as many true images are made or read at that size.
Mollifying and sharpening multiplies every coefficient by G²/(G² + ε²), G being the factor of T, in the samples. The
same is done to the true images, and wavenumbers are compared as far as half of a coefficient is kept. Samples of one
class are compared with true images of that class.

Writes spectrum.png and spectrum.json. Prints the mean of |log10(generated / true power)| over the wavenumbers and, as
an estimate of the sampling error, the same for as many other true images; and the slope of log power over log
wavenumber, over the lower half of the wavenumbers.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from data.datasets import log_images
from data.loader import to_float
from diffusion.gaussian_diffusion import build_diffusion
from experiments.lib.image_folders import SampleFolder, heldout_images
from experiments.lib.plots import line_plot, to_bytes
from experiments.metrics.images import log_ratio, log_slope, radial_spectrum
from utils import cli, config
from utils.errors import UserError
from utils.files import check_writable, replacing, write_json
from utils.images import to_uint8

CONFIG = config.define_config_flag("config", "autoencoder config, for its data set and mollifier")
SAMPLES = flags.DEFINE_list("samples", [], "folders of samples, separated by commas")
OUTPUT = flags.DEFINE_string("output", "spectrum", "folder for spectrum.png and spectrum.json")


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    if not SAMPLES.value:
        raise UserError("--samples is missing; give folders of generate_samples.py, separated by commas")
    output = Path(OUTPUT.value)
    check_writable(output, f"--output={output}")
    mollifier = build_diffusion(cfg).mollifier
    band = last_wavenumber(mollifier)
    folders = [SampleFolder(name, channels=cfg.data.channels) for name in SAMPLES.value]
    log_images(*folders)
    rows = [compare(folder, cfg, mollifier, band) for folder in folders]

    write_json(output / "spectrum.json", {"wavenumbers": [1, band], "sizes": rows})
    with replacing(output / "spectrum.png") as temporary:
        temporary.write_bytes(plot(rows, band))
    for row in rows:
        print("{0}x{1}, {count} samples: mean |log10 ratio| to the true spectrum {distance:.3f} (as many other true "
              "images: {distance_of_true:.3f}), mean log10 ratio {bias:+.3f}, slope {slope:.2f} (true: "
              "{slope_of_true:.2f})".format(*row["size"], **row))
    print(f"over the wavenumbers 1 to {band}; plot in {output}")


def compare(samples, cfg, mollifier, band):
    """Spectra, distances and settings of a SampleFolder as plain data, over the wavenumbers 1 to `band`."""
    count, size = len(samples), samples.size
    if min(size) <= band:
        raise UserError(f"--samples={samples.folder} are of {size[0]}x{size[1]}, fewer pixels than the {band} "
                        "wavenumbers to compare; give samples of at least data.img_size")
    classes = set(samples.settings.get("classes", []))
    images, _ = heldout_images(cfg, size, 2 * count, only=classes.pop() if len(classes) == 1 else None)
    if len(images) < 2 * count:
        raise UserError(f"--samples={samples.folder} holds {count} images, and twice as many held-out images are "
                        f"needed, but there are {len(images)}; set data.num_heldout_functions, or give fewer samples")
    exact = to_float(images)
    filtered = to_float(to_uint8(mollifier.sharpen(mollifier.blur(exact)).clamp(-1, 1)))
    pixels = torch.stack(list(samples))
    generated, true, other = (radial_spectrum(part) for part in (to_float(pixels), filtered[:count], filtered[count:]))
    distance, bias = log_ratio(generated, true, band)
    spectra = {"generated": generated, "true": true, "true_unfiltered": radial_spectrum(exact)}
    return {"samples": str(samples.folder), "size": list(size), "count": count, "made": samples.settings,
            "distance": distance, "bias": bias, "slope": log_slope(generated, band // 2),
            "slope_of_true": log_slope(true, band // 2), "distance_of_true": log_ratio(other, true, band)[0],
            "spectra": {name: values.tolist() for name, values in spectra.items()}}


def last_wavenumber(mollifier):
    """The largest wavenumber, in half waves per side, at which T and the Wiener filter keep half of a coefficient.

    That is where G(k) = exp(−(π²σ²/2) k²/R²) = ε, k = √(2 ln(1/ε)) R/(πσ), or R − 1 if that is smaller.
    """
    height, width = mollifier.train_size
    nyquist = min(height, width) - 1
    if mollifier.is_identity:
        return nyquist
    return min(nyquist, int(math.sqrt(-2 * math.log(mollifier.wiener_eps)) * min(height, width)
                            / (math.pi * mollifier.sigma)))


def plot(rows, band):
    """A PNG of all spectra up to twice the last wavenumber that is compared."""
    def points(values):
        return list(enumerate(values))[1:2 * band]

    finest = max(rows, key=lambda row: min(row["size"]))["spectra"]
    curves = {"true": points(finest["true_unfiltered"]), "true, after T and Wiener": points(finest["true"])}
    curves |= {"samples, {}x{}".format(*row["size"]): points(row["spectra"]["generated"]) for row in rows}
    return to_bytes(line_plot(curves, f"power spectrum (compared: wavenumbers 1 to {band})", "wavenumber (half waves "
                              "per side)", "mean square of a coefficient", log=True), "png")


if __name__ == "__main__":
    cli.run(main)
