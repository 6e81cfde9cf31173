r"""Stage 2: train the diffusion model over the autoencoder's latents.

    python train_latent_diffusion.py --config configs/ffhq_latent_config.py --config.run.experiment=ffhq_sampler \
        --decoder_config configs/ffhq_256_config.py --decoder_config.run.experiment=ffhq_mollified_256
"""

import functools
from typing import NamedTuple

import torch
from torch import nn

from data.datasets import build_dataset, log_images
from data.latents import latents_key, load_latents
from data.loader import training_item, training_positions
from diffusion.gaussian_diffusion import build_diffusion, sampling_diffusion
from diffusion.sampling import decode, encode, sample_latents
from diffusion.timestep_samplers import build_timestep_sampler
from models.build import build_latent_model
from models.load import load_autoencoder
from utils import cli, config, rng
from utils.checkpoint import digest
from utils.device import autocast, resolve_device, resolve_dtype
from utils.images import tile, to_uint8
from utils.logging import check_wandb
from utils.trainer import Trainer

CONFIG = config.define_config_flag("config", "latent config, for example configs/ffhq_latent_config.py")
DECODER_CONFIG = config.define_config_flag("decoder_config", "config of the trained autoencoder")
VALIDATION_PAIRS = 1024


class LatentBatch(NamedTuple):
    """A micro-batch of stage 2."""

    z: torch.Tensor  # standardised latents, float32 [B, Z]
    part: slice  # their places among the step's train.batch_size samples


def latent_batches(latents, cfg, start_step):
    """Endless batches of latents [N, Z] on their device, one for each of this rank's `training_positions`."""
    device = latents.device
    batch_size = cfg.train.batch_size
    for positions in training_positions(batch_size, start_step, cfg.train.accumulation_steps):
        items = [training_item(len(latents), cfg.run.seed, position)[0] for position in positions]
        first = positions.start % batch_size
        yield LatentBatch(latents[torch.tensor(items).to(device, non_blocking=True)], slice(first, first + len(items)))


def training_loss(modules, batch, step, diffusion, timesteps, cfg):
    """{"loss": mean loss of a batch at random time steps, and the means of its terms}, scalars."""
    device = batch.z.device

    def draw(make, purpose, *shape):
        """Drawn for the whole step at once: one generator per sample would take a quarter of the time."""
        one = rng.generator(device, cfg.run.seed, purpose, step)
        return make((cfg.train.batch_size, *shape), one, device)[batch.part]

    t, weights = timesteps.sample(draw(rng.rand, "t", 2), step)
    noise = draw(rng.randn, "noise", batch.z.shape[1])
    terms = diffusion.training_losses(modules["latent_model"], batch.z, t, None, noise)
    timesteps.record(t, terms["loss"])
    return {**{name: value.mean() for name, value in terms.items()}, "loss": (weights * terms["loss"]).mean()}


def validation_loss(modules, heldout, diffusion):
    """Mean loss over held-out latents [N, Z], repeated to about VALIDATION_PAIRS, at fixed noise and fixed time steps,
    which are spread evenly."""
    heldout = heldout.repeat(-(-VALIDATION_PAIRS // len(heldout)), 1)[:VALIDATION_PAIRS]
    order = torch.arange(len(heldout), device=heldout.device)
    noise = rng.randn(heldout.shape, rng.generator(heldout.device, "validation"), heldout.device)
    terms = diffusion.training_losses(modules["latent_model"], heldout, order * diffusion.num_steps // len(heldout),
                                      None, noise)
    return {"validation_loss": terms["loss"].mean().item()}


def pictures(modules, autoencoder, latents, cfg, decoder_cfg, device, tick):
    """Images decoded from sampled latents."""
    generators = rng.sample_generators(device, range(cfg.train.sample_size), cfg.run.seed, "samples")
    z = sample_latents(modules["latent_model"], sampling_diffusion(cfg, quick=True), latents.mean.to(device),
                       latents.std.to(device), generators, tick)
    size = (decoder_cfg.data.img_size, decoder_cfg.data.img_size)
    images = decode(autoencoder["decoder"], sampling_diffusion(decoder_cfg, quick=True), z, size, generators,
                    decoder_cfg.data.channels, progress=tick)
    return {"samples": tile(to_uint8(images), max(1, round(len(images) ** 0.5)))}


def main():
    cfg, decoder_cfg = config.read_latent_config(CONFIG), config.read_trained_autoencoder_config(DECODER_CONFIG)
    config.check_same_latent(cfg, decoder_cfg)
    device = resolve_device(cfg.run.device)
    check_wandb(cfg.run)
    config.micro_batch_size(cfg)  # raises if it is no whole number
    diffusion = build_diffusion(cfg)
    timesteps = build_timestep_sampler(cfg)
    torch.manual_seed(rng.seed_of(cfg.run.seed, "initial weights"))
    modules = nn.ModuleDict({"latent_model": build_latent_model(cfg)})
    autoencoder = load_autoencoder(decoder_cfg, device)
    encoder, dtype = autoencoder["encoder"], resolve_dtype(decoder_cfg.train, device)
    datasets = build_dataset(decoder_cfg, train=True), build_dataset(decoder_cfg, train=False)
    orientations = len(datasets[0].orientations)
    config.check_batch_fits(cfg, len(datasets[0]) * orientations, f"latents ({orientations} per image)")
    log_images(*datasets)
    key = latents_key(encoder, dtype, *datasets)

    trainer = Trainer(
        cfg, "latent", modules, functools.partial(training_loss, diffusion=diffusion, timesteps=timesteps, cfg=cfg),
        device, state={"timesteps": timesteps}, after_step=timesteps.end_step, source=key,
        filename="latent_checkpoint.pt", best="validation_loss", best_from=timesteps.settled)
    trainer.resume()  # before encoding, which can take an hour

    def encode_images(images):
        with autocast(device, dtype):
            return encode(encoder, images)

    latents = load_latents(config.run_dir(cfg) / "latents.pt", key, encode_images, *datasets,
                           decoder_cfg.train.batch_size // decoder_cfg.train.accumulation_steps, device,
                           decoder_cfg.data.num_workers)
    trainer.facts.update(mean=latents.mean, std=latents.std, encoder=digest(encoder.state_dict()))
    train_set, heldout = latents.train.to(device), latents.heldout.to(device)
    trainer.train(
        batches=lambda step: latent_batches(train_set, cfg, step),
        validate=lambda ema: validation_loss(ema, heldout, diffusion),
        plot=lambda ema, tick: pictures(ema, autoencoder, latents, cfg, decoder_cfg, device, tick),
        plot_steps=sum(sampling_diffusion(one, quick=True).evaluations for one in (cfg, decoder_cfg)))
    cli.point_to_report()


if __name__ == "__main__":
    cli.run(main, shared=True)
