"""What the applications share: which images they take, latents of a data set or a latent model, the file of scores."""

import json
import math

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from data.loader import all_batches
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.sampling import encode, sample_latents
from experiments.lib.image_folders import folder_images, heldout_images
from models.load import latent_path, load_latent_model
from utils import config, rng
from utils.checkpoint import identity
from utils.device import autocast, resolve_dtype
from utils.errors import UserError
from utils.files import replacing


def check_finite(*flags):
    """UserError where a float flag is nan or infinite, which absl lets pass."""
    for flag in flags:
        if not math.isfinite(flag.value):
            raise UserError(f"--{flag.name}={flag.value} must be a finite number")


def check_encoder(cfg):
    """UserError for a model without an encoder."""
    if not cfg.model.z_dim:
        raise UserError("config.model.z_dim=0: without an encoder images have no latents; give the config of a model "
                        "that has one")


def read_images(cfg, folder, size, count):
    """(uint8 [N, C, H, W], where they are from): held-out images or, with a folder, its images as they are.

    folder   value of --input, or None
    size     value of --sample_img_size, or None for the training resolution
    """
    if folder is None:
        return heldout_images(cfg, config.parse_image_size(size, cfg.data.img_size), count)
    if size is not None:
        raise UserError(f"--sample_img_size={size} is for held-out images, and those of --input keep their size; leave "
                        "it out")
    return folder_images("input", folder, cfg.data.channels, count, cfg.model.knn_neighbours)


def encode_all(encoder, dataset, count, batch_size, device):
    """Latents [N, Z] of the first `count` images of a data set, or as many as it has, on the device."""
    part = Subset(dataset, range(min(count, len(dataset))))
    batches = tqdm(all_batches(part, batch_size, device), "encoding", -(-len(part) // batch_size), unit="batch")
    return torch.cat([encode(encoder, images) for images, _ in batches])


def latent_sampler(flag, cfg, device, encoder):
    """(indices -> z [B, Z] on the device, identity of the model) of the flag's latent config; (None, None) without.

    Latent i is a function of run.seed and i: the one that generate_samples.py takes for sample i.
    """
    if flag.value is None:
        return None, None
    latent_cfg = config.read_trained_latent_config(flag)
    config.check_same_latent(latent_cfg, cfg)
    diffusion = build_diffusion(latent_cfg)
    model, mean, std = load_latent_model(latent_cfg, device, encoder)

    def draw(indices):
        generators = rng.sample_generators(device, indices, latent_cfg.run.seed, "latent")
        with autocast(device, resolve_dtype(latent_cfg.train, device)):
            return sample_latents(model, diffusion, mean, std, generators, "ddpm")

    return draw, identity(latent_path(latent_cfg))


def write_scores(path, scores, settings):
    """One JSON file of the scores and how they came about."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**scores, "settings": settings}, indent=2) + "\n")
