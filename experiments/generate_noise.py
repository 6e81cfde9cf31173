"""Write a baseline for scores: mollified noise with the mean and variance of the held-out images.

    python experiments/generate_noise.py --config configs/demo_config.py --output noise

Writes one image per held-out image, 00000.png, …; their score by calculate_fid.py is that of a useless model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from data.datasets import build_dataset, log_images
from data.loader import all_batches
from diffusion.gaussian_diffusion import build_diffusion
from experiments.lib.image_folders import ImageFolder
from utils import cli, config, rng

CONFIG = config.define_config_flag("config", "autoencoder config, for its data set and mollifier")
OUTPUT = flags.DEFINE_string("output", "noise", "folder for the images")
BATCH_SIZE = 64


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    mollifier = build_diffusion(cfg).mollifier
    dataset = build_dataset(cfg, train=False)
    log_images(dataset)
    images = torch.cat([batch for batch, *_ in all_batches(dataset, BATCH_SIZE)])
    folder = ImageFolder(OUTPUT.value, len(images), {
        "what": "mollified noise with the mean and variance of held-out images", "seed": cfg.run.seed,
        "data": dataset.fingerprint()})
    generators = rng.sample_generators("cpu", range(len(images)), cfg.run.seed, "noise images")
    noise = match_moments(mollifier.noise_like(images, generators), images)
    for indices, progress in folder.missing_batches(BATCH_SIZE):
        folder.save(indices, noise[indices])
        progress(1)
    print(f"{folder.total} images in {folder.path}")


def match_moments(noise, images):
    """Noise shifted and scaled to the mean and variance of images in each channel, both [N, C, H, W]."""
    noise_std, noise_mean = torch.std_mean(noise, (0, 2, 3), correction=0, keepdim=True)
    std, mean = torch.std_mean(images, (0, 2, 3), correction=0, keepdim=True)
    return mean + (noise - noise_mean) / noise_std * std


if __name__ == "__main__":
    cli.run(main)
