"""Encode images of a data set and decode them again, at any resolution.

    python experiments/generate_recons.py --config configs/ffhq_256_config.py [--num_samples 64] [--output recons]

Writes <output>/originals/00000.png, … and <output>/reconstructions/00000.png, …, and prints how close they are.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from torch.utils.data import Subset

from data.datasets import build_dataset
from data.loader import all_batches
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.samplers import SAMPLERS
from diffusion.sampling import decode, encode, reconstruction_scores
from experiments.lib.image_folders import ImageFolder
from experiments.lib.sampling import MAX_POINTS as DEFAULT_MAX_POINTS
from models.large_images import check_max_points
from models.load import autoencoder_path, load_autoencoder
from utils import cli, config, distributed, rng
from utils.checkpoint import identity
from utils.device import autocast, resolve_device, resolve_dtype
from utils.errors import UserError

CONFIG = config.define_config_flag("config", "config of the trained autoencoder")
SPLIT = flags.DEFINE_enum("split", "heldout", ["heldout", "train"], "which images to reconstruct")
SIZE = flags.DEFINE_string("sample_img_size", None, "side of the reconstructions in pixels, or HEIGHTxWIDTH; default: "
                           "the training resolution")
SAMPLER = flags.DEFINE_enum("sampler", "ddim", SAMPLERS, "how images are sampled")
STEPS = flags.DEFINE_integer("sampling_steps", 100, "network evaluations per image", lower_bound=1)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "how many images; default: data.fid_samples, or all there are",
                                   lower_bound=1)
MAX_POINTS = flags.DEFINE_integer("max_points", DEFAULT_MAX_POINTS, "pixels, of all images together, that the network "
                                  "takes at a time; fewer need less memory", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "folder for the images; default: reconstructions/<experiment>_<size>")


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    if not cfg.model.z_dim:
        raise UserError("config.model.z_dim=0: without an encoder nothing is reconstructed; use generate_samples.py")
    height, width = size = config.parse_image_size(SIZE.value, cfg.data.img_size)
    diffusion = build_diffusion(cfg, STEPS.value, SAMPLER.value)
    device = resolve_device(cfg.run.device)
    dtype = resolve_dtype(cfg.train, device)
    dataset = build_dataset(cfg, train=SPLIT.value == "train")
    modules = load_autoencoder(cfg, device)
    check_max_points(modules["decoder"], size, MAX_POINTS.value)

    output = Path(OUTPUT.value or f"reconstructions/{cfg.run.experiment}_{height}x{width}")
    total = min(NUM_SAMPLES.value or cfg.data.fid_samples, len(dataset))
    source = {"split": SPLIT.value, "data": dataset.fingerprint()}
    originals = ImageFolder(output / "originals", total, source, output)
    folder = ImageFolder(output / "reconstructions", total, {
        **source, "size": [height, width], "seed": cfg.run.seed, "sampler": SAMPLER.value, "steps": STEPS.value,
        "decoder": identity(autoencoder_path(cfg))}, output)

    for indices, progress in folder.missing_batches(cfg.train.sample_size, evaluations=STEPS.value):
        images, _ = next(all_batches(Subset(dataset, indices), len(indices), device))
        with autocast(device, dtype):
            z = encode(modules["encoder"], images, max_points=MAX_POINTS.value)
            generators = rng.sample_generators(device, indices, cfg.run.seed, "reconstruction")
            result = decode(modules["decoder"], diffusion, z, size, SAMPLER.value, generators, cfg.data.channels,
                            progress=progress, max_points=MAX_POINTS.value)
        originals.save(indices, images)
        folder.save(indices, result)

    if not distributed.is_main():
        return
    scores = reconstruction_scores(originals.load(), folder.load(), diffusion.mollifier)
    (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(f"{total} images: mollified PSNR {scores['mollified_psnr']:.2f} dB, {scores['nearest_is_own']} of {total} "
          f"reconstructions have their own original as the nearest one; images in {output}")


if __name__ == "__main__":
    cli.run(main, shared=True)
