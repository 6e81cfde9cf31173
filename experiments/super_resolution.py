"""Enlarge images: encode the small one and decode at a higher resolution, consistently with it (METHOD, applications).

    python experiments/super_resolution.py --config configs/ffhq_256_config.py --input_img_size 64 --scale 4

Held-out images are the truth, and made smaller by bicubic interpolation with antialiasing they are the inputs; or
--input is a folder of small images. Writes <output>/inputs, truth and the images of every method, grid.png and
scores.json. Image i is a function of run.seed and i, and a run that was stopped continues.

The mollifier leaves hardly anything finer than two pixels of the training resolution, so that is where detail ends: at
--scale 4 from there the result is an interpolation; the 64² images above, for a model of 256², get detail added.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from data.images import read_image
from data.loader import to_float
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.guidance import Consistent, Constraint, Downsampling
from diffusion.samplers import SAMPLERS, sample
from diffusion.sampling import decode, encode, images_at_once
from experiments.lib.applications import check_encoder, check_finite, write_scores
from experiments.lib.image_folders import ImageFolder
from experiments.lib.image_grid import save_sheet
from experiments.lib.sampling import MAX_POINTS
from experiments.lib.super_resolution import interpolations, read_inputs, score
from models.large_images import check_max_points
from models.load import autoencoder_path, load_autoencoder
from utils import cli, config, rng
from utils.checkpoint import identity
from utils.device import autocast, resolve_device, resolve_dtype
from utils.errors import UserError

CONFIG = config.define_config_flag("config", "config of the trained autoencoder")
INPUT_SIZE = flags.DEFINE_string("input_img_size", None, "side of the inputs in pixels, or HEIGHTxWIDTH; default: the "
                                 "training resolution")
SCALE = flags.DEFINE_integer("scale", 2, "how many times as large as the inputs", lower_bound=2)
SIZE = flags.DEFINE_string("sample_img_size", None, "side of results in pixels, or HEIGHTxWIDTH; instead of --scale")
CONSISTENCY = flags.DEFINE_float("consistency", 1.0, "how far the estimate of each step is moved to one that gives the "
                                 "input when resized: 0 not, 1 all the way", lower_bound=0.0, upper_bound=1.0)
SAMPLER = flags.DEFINE_enum("sampler", "ddim", SAMPLERS, "how images are sampled")
STEPS = flags.DEFINE_integer("sampling_steps", 100, "network evaluations per image", lower_bound=1)
ETA = flags.DEFINE_float("eta", 0.0, "noise of ddim: 0 none, 1 as much as ddpm", lower_bound=0.0, upper_bound=1.0)
INPUT = flags.DEFINE_string("input", None, "folder of small images of one size, instead of held-out ones")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 16, "how many images at most", lower_bound=1)
POINTS = flags.DEFINE_integer("max_points", MAX_POINTS, "pixels, of all images together, that the network takes at a "
                              "time; fewer need less memory", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "folder for the results; default: super_resolution/<experiment>_<size>")
SHOWN = 8  # rows of the grid


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    check_encoder(cfg)
    check_flags()
    diffusion = build_diffusion(cfg, STEPS.value, SAMPLER.value)
    device = resolve_device(cfg.run.device)
    dtype = resolve_dtype(cfg.train, device)
    low_size = config.parse_image_size(INPUT_SIZE.value, cfg.data.img_size, INPUT_SIZE.name)
    low, truth, size, source = read_inputs(cfg, INPUT.value, low_size, size_of, NUM_SAMPLES.value)
    modules = load_autoencoder(cfg, device)
    check_max_points(modules["decoder"], size, POINTS.value)

    output = Path(OUTPUT.value or f"super_resolution/{cfg.run.experiment}_{size[0]}x{size[1]}")
    settings = {**source, "input_size": list(low.shape[-2:]), "size": list(size), "consistency": CONSISTENCY.value,
                "sampler": SAMPLER.value, "steps": STEPS.value, "eta": ETA.value, "seed": cfg.run.seed,
                "decoder": identity(autoencoder_path(cfg))}
    weights = {"decoded": 0.0, "consistent": CONSISTENCY.value} if CONSISTENCY.value else {"decoded": 0.0}
    names = ["inputs", "bicubic", "lanczos", "backprojected", *weights, *(["truth"] if truth is not None else [])]
    folders = {name: ImageFolder(output / name, len(low), settings, output) for name in names}

    operator = Downsampling(size, low.shape[-2:], device)
    at_once = images_at_once(cfg.train.sample_size, size, POINTS.value)
    for indices, progress in folders[names[-1]].missing_batches(at_once, STEPS.value * len(weights)):
        small = to_float(low[indices]).to(device)
        constraint = Constraint(operator, small, diffusion.mollifier)
        made = {"inputs": small, **interpolations(low[indices], size, constraint)}
        with autocast(device, dtype):
            z = encode(modules["encoder"], small, max_points=POINTS.value)
            for name, weight in weights.items():
                generators = rng.sample_generators(device, indices, cfg.run.seed, "super-resolution")
                made[name] = enlarge(modules["decoder"], diffusion, z, constraint, weight, size, generators, progress)
        if truth is not None:
            made["truth"] = to_float(truth[indices])
        for name in names:
            folders[name].save(indices, made[name])

    scores = score(folders)
    write_scores(output / "scores.json", {"count": len(low), "methods": scores}, settings)
    save_sheet({name: [read_image(folder.file(i)) for i in range(min(len(low), SHOWN))]
                for name, folder in folders.items()}, output / "grid.png")
    for name, row in scores.items():
        print(f"{name:14}" + " · ".join(f"{what} {value:.3f}" for what, value in row.items()))
    print(f"{len(low)} images of {size[0]}x{size[1]} in {output}")


def check_flags():
    """What is impossible or does not go together."""
    check_finite(CONSISTENCY, ETA)
    if ETA.value and SAMPLER.value != "ddim":
        raise UserError(f"--eta={ETA.value} is of --sampler=ddim only; leave it out with {SAMPLER.value}")
    if SIZE.value is not None and SCALE.present:
        raise UserError(f"--scale={SCALE.value} and --sample_img_size={SIZE.value} both say how large; give one")
    if INPUT.value is not None and INPUT_SIZE.value is not None:
        raise UserError(f"--input_img_size={INPUT_SIZE.value} is for held-out images, and those of --input keep their "
                        "size; leave it out")


def size_of(low_size):
    """(H, W) of the results, from that of the inputs."""
    if SIZE.value is not None:
        return config.parse_image_size(SIZE.value, None)
    return tuple(SCALE.value * length for length in low_size)


def enlarge(decoder, diffusion, z, constraint, weight, size, generators, progress):
    """Samples [B, C, H, W] for latents z; unless weight is 0 their estimates meet the constraint, and so do they."""
    def path(denoise, x):
        denoise = Consistent(denoise, constraint, weight) if weight else denoise
        return sample(SAMPLER.value, denoise, x, diffusion, generators, ETA.value)

    images = decode(decoder, diffusion, z, size, generators=generators, channels=constraint.data.shape[1],
                    progress=progress, path=path, max_points=POINTS.value)
    return constraint.enforce(images) if weight else images


if __name__ == "__main__":
    cli.run(main)
