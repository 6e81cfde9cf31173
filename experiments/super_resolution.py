"""Enlarge images: encode the small one and decode it at a higher resolution, consistently (docs/method.md, 6.2).

    python experiments/super_resolution.py --config configs/ffhq_256_config.py --input_img_size 64 --scale 4

The inputs are held-out images, reduced by bicubic interpolation with antialiasing, or the images of --input. Writes
<output>/inputs, truth and one folder per method, grid.png and scores.json. Image i is a function of run.seed and i.
The same command resumes an interrupted run.

The mollifier removes detail finer than about two pixels of the training resolution. Results beyond that resolution are
therefore interpolations; the command above, for a model of 256² images, adds detail.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from data.loader import to_float
from diffusion.guidance import Consistent, Constraint
from diffusion.operators import Downsampling
from diffusion.samplers import sample
from diffusion.sampling import images_at_once
from experiments.lib.applications import check_encoder, open_folders, save_batch, write_grid, write_scores
from experiments.lib.sampling import (
    TrainedAutoencoder,
    check_eta,
    eta_flag,
    float_flag,
    input_flag,
    inv_snr_flag,
    max_points_flag,
    sampler_flag,
    size_flag,
    steps_flag,
)
from experiments.lib.super_resolution import interpolations, read_inputs, score
from utils import cli, config
from utils.errors import UserError

CONFIG = config.define_config_flag("config", "config of the trained autoencoder")
INPUT_SIZE = flags.DEFINE_string("input_img_size", None, "size of the inputs in pixels, SIDE or HEIGHTxWIDTH; default: "
                                 "the training resolution")
SCALE = flags.DEFINE_integer("scale", 2, "ratio of result to input size", lower_bound=2)
SIZE = size_flag("the results, instead of --scale")
CONSISTENCY = float_flag("consistency", 1.0, "share of the input in the estimate of each step: 0 for none, 1 for an "
                         "estimate that reduces to exactly the input", high=1.0)
SAMPLER, STEPS, ETA = sampler_flag(), steps_flag(), eta_flag()
INPUT = input_flag()
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 16, "largest number of images", lower_bound=1)
INV_SNR, MAX_POINTS = inv_snr_flag(), max_points_flag()
OUTPUT = flags.DEFINE_string("output", None, "folder for the results; default: super_resolution/<experiment>_<size>")


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    check_encoder(cfg)
    check_flags(cfg)
    input_size = config.parse_image_size(INPUT_SIZE.value, cfg.data.img_size, INPUT_SIZE.name)
    autoencoder = TrainedAutoencoder(cfg, STEPS.value, SAMPLER.value, MAX_POINTS.value, inv_snr=INV_SNR.value)
    small, truth, size, origin = read_inputs(cfg, INPUT.value, input_size, result_size, NUM_SAMPLES.value)
    input_size, total = list(small.shape[-2:]), len(small)
    autoencoder.check_size(size)

    output = Path(OUTPUT.value or f"super_resolution/{cfg.run.experiment}_{size[0]}x{size[1]}")
    settings = {**origin, "input_size": input_size, "size": list(size), "consistency": CONSISTENCY.value,
                "sampler": autoencoder.sampler, "steps": autoencoder.steps, "eta": ETA.value, "seed": cfg.run.seed,
                "inv_snr": INV_SNR.value, "decoder": autoencoder.identity}
    weights = {"decoded": 0.0, "consistent": CONSISTENCY.value} if CONSISTENCY.value else {"decoded": 0.0}
    names = ["inputs", "bicubic", "lanczos", "backprojected", *weights, *(["truth"] if truth is not None else [])]
    folders = open_folders(output, dict.fromkeys(names, total), settings)

    operator = Downsampling(size, input_size, device=autoencoder.device)
    batch_size = images_at_once(cfg.train.sample_size, size, MAX_POINTS.value)
    for indices, progress in folders[names[-1]].missing_batches(batch_size, autoencoder.steps * len(weights),
                                                                 folders.values()):
        inputs = to_float(small[indices]).to(autoencoder.device)
        constraint = Constraint(operator, inputs, autoencoder.diffusion.mollifier)
        images = {"inputs": inputs, **interpolations(small[indices], size, constraint)}
        z = autoencoder.encode(inputs)
        for name, weight in weights.items():
            generators = autoencoder.generators(indices, "super-resolution")
            images[name] = enlarge(autoencoder, z, constraint, weight, size, generators, progress)
        if truth is not None:
            images["truth"] = to_float(truth[indices])
        save_batch(folders, indices, images)

    scores = score(folders)
    write_scores(output, {"count": total, "methods": scores}, settings, cfg)
    write_grid(output, folders)
    for name, row in scores.items():
        print(f"{name:14}" + " · ".join(f"{score} {value:.3f}" for score, value in row.items()))
    print(f"{total} images of {size[0]}x{size[1]} in {output}")


def check_flags(cfg):
    """UserError for flags that contradict each other."""
    check_eta(ETA, SAMPLER, cfg)
    if SIZE.value is not None and SCALE.present:
        raise UserError(f"--scale={SCALE.value} and --sample_img_size={SIZE.value} both set the size of the results; "
                        "give one of them")
    if INPUT.value is not None and INPUT_SIZE.value is not None:
        raise UserError(f"--input_img_size={INPUT_SIZE.value} applies to held-out images only, and images of --input "
                        "keep their size; leave it out")


def result_size(input_size):
    """(H, W) of the results for inputs of size (h, w)."""
    if SIZE.value is not None:
        return config.parse_image_size(SIZE.value, None)
    size = tuple(SCALE.value * length for length in input_size)
    config.check_image_size(size, f"--scale={SCALE.value}")
    return size


def enlarge(autoencoder, z, constraint, weight, size, generators, progress):
    """Samples [B, C, H, W] for latents z; unless weight is 0, they and their estimates meet the constraint."""
    def path(denoise, x):
        denoise = Consistent(denoise, constraint, weight) if weight else denoise
        return sample(denoise, x, autoencoder.diffusion, generators, ETA.value)

    images = autoencoder.decode(z, size, generators=generators, progress=progress, path=path)
    return constraint.enforce(images) if weight else images


if __name__ == "__main__":
    cli.run(main)
