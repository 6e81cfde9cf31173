"""What the scripts that sample a trained pair of models share: the flags, and a folder of images made with them."""

import functools
from typing import NamedTuple

import torch
from absl import flags

from diffusion.gaussian_diffusion import build_diffusion
from diffusion.samplers import SAMPLERS
from diffusion.sampling import decode, sample_latents
from diffusion.window import check_window, decode_window
from experiments.lib.applications import check_finite
from experiments.lib.image_folders import ImageFolder
from models.large_images import check_max_points
from models.load import autoencoder_path, latent_path, load_autoencoder, load_latent_model
from utils import config, rng
from utils.checkpoint import identity
from utils.device import autocast, resolve_device, resolve_dtype
from utils.errors import UserError

MAX_POINTS = 2**20  # default of --max_points: 3 GB with 64 features in float32, and an image of 1024² at once


class SamplingFlags(NamedTuple):
    """Flags that say how samples are made, as absl holds them."""

    size: flags.FlagHolder
    sampler: flags.FlagHolder
    steps: flags.FlagHolder
    eta: flags.FlagHolder
    latent_sampler: flags.FlagHolder
    latent_steps: flags.FlagHolder
    max_points: flags.FlagHolder

    def given(self):
        """Names of those that stand on the command line."""
        return [holder.name for holder in self if holder.present]


def define_sampling_flags():
    """--sample_img_size, --sampler and so on; call it once in a script."""
    return SamplingFlags(
        flags.DEFINE_string("sample_img_size", None, "side of the samples in pixels, or HEIGHTxWIDTH; default: the "
                            "training resolution"),
        flags.DEFINE_enum("sampler", "ddim", SAMPLERS, "how images are sampled"),
        flags.DEFINE_integer("sampling_steps", 100, "network evaluations per image", lower_bound=1),
        flags.DEFINE_float("eta", 0.0, "noise of ddim: 0 none, 1 as much as ddpm", lower_bound=0.0, upper_bound=1.0),
        flags.DEFINE_enum("latent_sampler", "ddpm", SAMPLERS, "how latents are sampled"),
        flags.DEFINE_integer("latent_sampling_steps", None, "network evaluations per latent; default: all",
                             lower_bound=1),
        flags.DEFINE_integer("max_points", MAX_POINTS, "pixels, of all images together, that the network takes at a "
                             "time; fewer need less memory", lower_bound=1))


def make_samples(cfg, decoder_cfg, options, total, output=None, window=None):
    """Samples 0 to total − 1 of a trained pair of models as an ImageFolder; those that are there already are kept.

    cfg, decoder_cfg   checked configs of the latent model (None where there is no encoder) and of the autoencoder
    options            SamplingFlags
    total              how many; None: data.fid_samples of cfg
    output             the folder; None: samples/<experiment>_<height>x<width>[_<window>]
    window             "x0 y0 x1 y1", fractions of the images: only this part of them
    Image i is a function of run.seed and i: it does not depend on the batch size or on interruptions.
    """
    if cfg is not None:
        config.check_same_latent(cfg, decoder_cfg)
    elif decoder_cfg.model.z_dim:
        raise UserError("an autoencoder is sampled with a latent model; give the config of that as --config, and the "
                        "autoencoder's as --decoder_config (only with model.z_dim=0 it is sampled alone)")
    own = cfg or decoder_cfg
    height, width = size = config.parse_image_size(options.size.value, decoder_cfg.data.img_size)
    part = config.parse_window(window, size)
    sampler, steps, eta = options.sampler.value, options.steps.value, options.eta.value
    check_finite(options.eta)
    if eta and sampler != "ddim":
        raise UserError(f"--eta={eta} is of --sampler=ddim only; leave it out with {sampler}")
    diffusion = build_diffusion(decoder_cfg, steps, sampler)
    draw, where = decode, ""
    if part:
        check_window(diffusion)
        draw = functools.partial(decode_window, window=part)
        where = "_rows_{}_{}_columns_{}_{}".format(*part[0], *part[1])
    device = resolve_device(own.run.device)
    dtype = resolve_dtype(decoder_cfg.train, device)
    autoencoder = load_autoencoder(decoder_cfg, device)
    check_max_points(autoencoder["decoder"], size, options.max_points.value)
    draw_latents, latent_settings = _latent_source(cfg, options, device, autoencoder["encoder"])

    folder = ImageFolder(
        output or f"samples/{own.run.experiment}_{height}x{width}{where}",
        total=total or own.data.fid_samples,
        settings={"size": [height, width], "window": part and [list(span) for span in part], "seed": own.run.seed,
                  "sampler": sampler, "steps": steps, "eta": eta,
                  "decoder": identity(autoencoder_path(decoder_cfg)), **latent_settings})

    for indices, progress in folder.missing_batches(own.train.sample_size, evaluations=steps):
        z = draw_latents(indices)
        with autocast(device, dtype):
            images = draw(autoencoder["decoder"], diffusion, z, size, sampler=sampler, eta=eta, progress=progress,
                          generators=rng.sample_generators(device, indices, own.run.seed, "image"),
                          channels=decoder_cfg.data.channels, max_points=options.max_points.value)
        folder.save(indices, images)
    return folder


def _latent_source(cfg, options, device, encoder):
    """(indices -> latents [B, Z] of these samples, settings to keep with the samples)."""
    if cfg is None:
        return lambda indices: torch.zeros(len(indices), 0, device=device), {"latent_model": "none"}
    sampler = options.latent_sampler.value
    diffusion = build_diffusion(cfg, options.latent_steps.value, sampler)
    dtype = resolve_dtype(cfg.train, device)
    model, mean, std = load_latent_model(cfg, device, encoder)

    def draw(indices):
        with autocast(device, dtype):
            return sample_latents(model, diffusion, mean, std,
                                  rng.sample_generators(device, indices, cfg.run.seed, "latent"), sampler)

    return draw, {"latent_sampler": sampler, "latent_steps": options.latent_steps.value,
                  "latent_model": identity(latent_path(cfg))}
