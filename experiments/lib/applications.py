"""What the applications of a trained autoencoder share: input images, result folders, a grid, and a file of scores."""

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from data.images import read_image
from data.loader import all_batches
from experiments.lib.image_folders import ImageFolder, folder_images, heldout_images
from experiments.lib.plots import save_grid
from experiments.lib.sampling import latent_source
from utils import config
from utils.errors import UserError
from utils.files import write_json

SHOWN = 8  # rows of grid.png


def check_encoder(cfg):
    """UserError for a model without an encoder."""
    if not cfg.model.z_dim:
        raise UserError("config.model.z_dim=0: a model without an encoder has no latents of images; give the config of "
                        "a model with an encoder")


def read_images(cfg, folder, size, count):
    """(uint8 [N, C, H, W], their origin as plain data): held-out images or, given a folder, its images as they are.

    folder   value of --input, or None
    size     value of --sample_img_size, or None for the training resolution
    """
    if folder is None:
        return heldout_images(cfg, config.parse_image_size(size, cfg.data.img_size), count)
    if size is not None:
        raise UserError(f"--sample_img_size={size} applies to held-out images only, and images of --input keep their "
                        "size; leave it out")
    return folder_images(cfg, folder, count)


def encode_first(autoencoder, dataset, count):
    """Latents [N, Z] of the first `count` images of a data set, or of all it has, by a TrainedAutoencoder."""
    part, batch_size = Subset(dataset, range(min(count, len(dataset)))), autoencoder.cfg.train.sample_size
    batches = tqdm(all_batches(part, batch_size, autoencoder.device), "encoding", -(-len(part) // batch_size),
                   unit="batch")
    return torch.cat([autoencoder.encode(images) for images, _ in batches])


def latent_sampler(flag, autoencoder):
    """(indices -> z [B, Z], identity of the model) for the flag --latent_config; (None, None) if it is not set.

    Latent i is that of sample i of generate_samples.py.
    """
    if flag.value is None:
        return None, None
    cfg = config.read_trained_latent_config(flag)
    config.check_same_latent(cfg, autoencoder.cfg)
    draw, settings = latent_source(cfg, autoencoder)
    return draw, settings["latent_model"]


def open_folders(output, counts, settings):
    """{name: ImageFolder <output>/<name>} for {name: number of images}, all with the same settings."""
    return {name: ImageFolder(output / name, count, settings, output) for name, count in counts.items()}


def save_batch(folders, indices, images):
    """Save {name: images [B, C, H, W]} in the folders of these names."""
    for name, batch in images.items():
        folders[name].save(indices, batch)


def write_scores(output, scores, settings, cfg):
    """Write <output>/scores.json: the scores, the settings that they were obtained with, and the name of the run."""
    write_json(output / "scores.json", {**scores, "settings": {**settings, "experiment": cfg.run.experiment}})


def write_grid(output, folders):
    """Write <output>/grid.png: a row per image, the first SHOWN, and a column per folder."""
    columns = {name: [read_image(folder.file(i)) for i in range(min(folder.total, SHOWN))]
               for name, folder in folders.items()}
    save_grid(columns, output / "grid.png")
