"""What the applications of a trained autoencoder share: flags, model, input images, result folders, grid and scores."""

from pathlib import Path

import torch
from absl import flags
from torch.utils.data import Subset
from tqdm import tqdm

from data.images import read_image
from data.loader import all_batches
from experiments.lib.image_folders import ImageFolder, folder_images, heldout_images
from experiments.lib.plots import save_grid
from experiments.lib.sampling import (
    TrainedAutoencoder,
    arrays_flag,
    condition_flags,
    inv_snr_flag,
    latent_source,
    max_points_flag,
    parse_image_size,
    sampler_flag,
    size_flag,
    steps_flag,
)
from utils import config
from utils.errors import UserError
from utils.files import write_json

SHOWN = 8  # rows of grid.png


class Application:
    """The flags that the applications share, and what follows from them. A script makes one.

    name     folder of the results, if there is no --output
    steps    default of --sampling_steps, of a script that chooses the sampler; None: one with --sampler
    latents  what --latent_config is for; None: there is no such flag
    count    default of --num_samples; None: there is no such flag
    images   what --sample_img_size is the size of
    """

    def __init__(self, name, steps=None, latents="sample z from its model", count=16, images="held-out images"):
        self.name = name
        self.config = config.define_config_flag("config", "config of the trained autoencoder")
        self.latent_config = latents and config.define_config_flag("latent_config", f"latent config: {latents}")
        self.sampler = sampler_flag() if steps is None else None
        self.steps = steps_flag(steps)
        self.size = size_flag(images)
        self.input = flags.DEFINE_string("input", None, "folder of images of one size, instead of held-out images")
        self.count = count and flags.DEFINE_integer("num_samples", count, "largest number of images", lower_bound=1)
        self.inv_snr, self.max_points, self.arrays = inv_snr_flag(), max_points_flag(), arrays_flag()
        self.control = condition_flags()
        self.output = flags.DEFINE_string("output", None, f"folder for the results; default: one in {name}/")

    def load(self, cfg, sampler=None):
        """The TrainedAutoencoder of a checked config. Its decoder has gradients with respect to states only.

        sampler   that of a script without --sampler; None: the objective's first
        """
        if sampler is None and self.sampler is not None:
            sampler = self.sampler.value
        autoencoder = TrainedAutoencoder(cfg, self.steps.value, sampler, self.max_points.value,
                                         inv_snr=self.inv_snr.value, control=self.control,
                                         has_data=self.input.value is None)
        autoencoder.decoder.requires_grad_(False)
        return autoencoder

    def read_images(self, autoencoder, count):
        """(uint8 [N, C, H, W], their origin as plain data): at most `count` held-out images, whose conditions the
        TrainedAutoencoder then uses, or, with --input, the images of that folder as they are."""
        cfg = autoencoder.cfg
        if self.input.value is None:
            return heldout_images(cfg, parse_image_size(self.size.value, cfg.data.img_size), count, autoencoder)
        if self.size.value is not None:
            raise UserError(f"--sample_img_size={self.size.value} applies to held-out images only, and images of "
                            "--input keep their size; leave it out")
        return folder_images(cfg, self.input.value, count)

    def latent_sampler(self, autoencoder):
        """(indices -> z [B, Z], identity of the model) of --latent_config; (None, None) if it is not set.

        Latent i is that of sample i of generate_samples.py.
        """
        if self.latent_config.value is None:
            return None, None
        cfg = config.read_trained_latent_config(self.latent_config)
        config.check_same_latent(cfg, autoencoder.cfg)
        draw, settings = latent_source(cfg, autoencoder)
        return draw, settings["latent_model"]

    def results(self, autoencoder, suffix, counts, settings):
        """Results in --output or <name>/<experiment><suffix>; `settings` are those that only this application has."""
        cfg = autoencoder.cfg
        output = Path(self.output.value or f"{self.name}/{cfg.run.experiment}{suffix}")
        return Results(output, counts, {
            **settings, "sampler": autoencoder.sampler, "steps": autoencoder.steps, "seed": cfg.run.seed,
            "inv_snr": self.inv_snr.value, "decoder": autoencoder.identity, **autoencoder.settings},
            cfg.run.experiment, self.arrays.value)


class Results:
    """Folders of images in `output`, which share their settings, with a file of scores and a grid.

    counts     {name: number of images}
    folders    {name: ImageFolder}
    """

    def __init__(self, output, counts, settings, experiment, arrays):
        self.output, self.settings, self.experiment, self.arrays = output, settings, experiment, arrays
        self.folders = {name: self.folder(name, count) for name, count in counts.items()}

    def folder(self, name, count):
        """The ImageFolder <output>/<name>."""
        return ImageFolder(self.output / name, count, self.settings, self.output, self.arrays)

    def missing_batches(self, batch_size, evaluations):
        """ImageFolder.missing_batches of all folders."""
        *others, last = self.folders.values()
        return last.missing_batches(batch_size, evaluations, others)

    def save(self, indices, images):
        """Save {name: images [B, C, H, W]} in the folders of these names."""
        for name, batch in images.items():
            self.folders[name].save(indices, batch)

    def write_scores(self, scores):
        """Write scores.json: the scores, the settings that they were obtained with, and the name of the run."""
        write_json(self.output / "scores.json",
                   {**scores, "settings": {**self.settings, "experiment": self.experiment}})

    def write_grid(self):
        """Write grid.png: a row per image, the first SHOWN, and a column per folder."""
        save_grid({name: [read_image(folder.file(i)) for i in range(min(folder.total, SHOWN))]
                   for name, folder in self.folders.items()}, self.output / "grid.png")


def check_encoder(cfg):
    """UserError for a model without an encoder."""
    if not cfg.model.z_dim:
        raise UserError("config.model.z_dim=0: a model without an encoder has no latents of images; give the config of "
                        "a model with an encoder")


def encode_first(autoencoder, dataset, count):
    """Latents [N, Z] of the first `count` images of a data set, or of all it has, by a TrainedAutoencoder."""
    part, batch_size = Subset(dataset, range(min(count, len(dataset)))), autoencoder.cfg.train.sample_size
    batches = tqdm(all_batches(part, batch_size, autoencoder.device), "encoding", -(-len(part) // batch_size),
                   unit="batch")
    return torch.cat([autoencoder.encode(images) for images, *_ in batches])
