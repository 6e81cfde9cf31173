"""Write the images that a useful model has to beat: mollified noise with the mean and variance of held-out images.

    python experiments/generate_noise.py --config configs/demo_config.py --output noise

As many images as are held out, 00000.png, …; score them with calculate_fid.py to see what a bad score is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from data.datasets import build_dataset
from data.loader import all_batches
from diffusion.gaussian_diffusion import build_diffusion
from experiments.lib.image_folders import ImageFolder
from utils import cli, config, rng

CONFIG = config.define_config_flag("config", "autoencoder config, for its data set and mollifier")
OUTPUT = flags.DEFINE_string("output", "noise", "folder for the images")


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    mollifier = build_diffusion(cfg).mollifier
    dataset = build_dataset(cfg, train=False)
    images = torch.cat([batch for batch, _ in all_batches(dataset, 64)])
    folder = ImageFolder(OUTPUT.value, len(images), {
        "what": "mollified noise with the mean and variance of held-out images", "seed": cfg.run.seed,
        "data": dataset.fingerprint()})
    generators = rng.sample_generators("cpu", range(len(images)), cfg.run.seed, "noise images")
    noise = match_moments(mollifier.noise_like(images, generators), images)
    for indices, progress in folder.missing_batches(64):
        folder.save(indices, noise[indices])
        progress(1)
    print(f"{folder.total} images in {folder.path}")


def match_moments(noise, images):
    """Noise shifted and scaled so that each channel has the mean and variance of images, both [N, C, H, W]."""
    def mean(x):
        return x.mean((0, 2, 3), keepdim=True)

    def deviation(x):
        return (x - mean(x)).square().mean((0, 2, 3), keepdim=True).sqrt()

    return mean(images) + (noise - mean(noise)) / deviation(noise) * deviation(images)


if __name__ == "__main__":
    cli.run(main)
