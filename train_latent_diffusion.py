r"""Stage 2: train the diffusion model over the autoencoder's latents.

    python train_latent_diffusion.py --config configs/ffhq_latent_config.py --config.run.experiment=ffhq_sampler \
        --decoder_config configs/ffhq_256_config.py --decoder_config.run.experiment=ffhq_mollified_256
"""

import functools
from typing import NamedTuple

import torch
from torch import nn

from data.conditions import dropped
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
from utils.errors import UserError
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
    condition: torch.Tensor | None = None  # of their images (data.conditions)


def latent_batches(latents, cfg, start_step, condition=None):
    """Endless batches of latents [N, Z] on their device, one for each of this rank's `training_positions`."""
    device = latents.device
    batch_size = cfg.train.batch_size
    for positions in training_positions(batch_size, start_step, cfg.train.accumulation_steps):
        items = [training_item(len(latents), cfg.run.seed, position)[0] for position in positions]
        first = positions.start % batch_size
        items = torch.tensor(items).to(device, non_blocking=True)
        yield LatentBatch(latents[items], slice(first, first + len(items)), condition if condition is None else
                          condition[items])


def training_loss(modules, batch, step, diffusion, timesteps, cfg):
    """{"loss": mean loss of a batch at random time steps, and the means of its terms}, scalars."""
    device = batch.z.device

    def draw(make, purpose, *shape):
        """Drawn for the whole step at once: one generator per sample would take a quarter of the time."""
        one = rng.generator(device, cfg.run.seed, purpose, step)
        return make((cfg.train.batch_size, *shape), one, device)[batch.part]

    t, weights = timesteps.sample(draw(rng.rand, "t", 2), step)
    noise = draw(rng.randn, "noise", batch.z.shape[1])
    condition = batch.condition
    if condition is not None:
        condition = dropped(condition, draw(rng.rand, "condition dropout"), cfg.model.condition_dropout)
    terms = diffusion.training_losses(lambda z, time: modules["latent_model"](z, time, condition), batch.z, t, None,
                                      noise)
    timesteps.record(t, terms["loss"])
    return {**{name: value.mean() for name, value in terms.items()}, "loss": (weights * terms["loss"]).mean()}


def validation_loss(modules, heldout, diffusion, condition=None):
    """Mean loss over held-out latents [N, Z], repeated to VALIDATION_PAIRS, at fixed noise and fixed time steps,
    which are spread evenly."""
    order = torch.arange(VALIDATION_PAIRS, device=heldout.device)
    items = order % len(heldout)
    heldout, condition = heldout[items], condition if condition is None else condition[items]
    noise = rng.randn(heldout.shape, rng.generator(heldout.device, "validation"), heldout.device)
    terms = diffusion.training_losses(lambda z, time: modules["latent_model"](z, time, condition), heldout,
                                      order * diffusion.num_steps // len(heldout), None, noise)
    return {"validation_loss": terms["loss"].mean().item()}


def pictures(modules, autoencoder, latents, cfg, decoder_cfg, device, tick):
    """Images decoded from sampled latents."""
    count, condition = cfg.train.sample_size, latents.heldout_condition
    generators = rng.sample_generators(device, range(count), cfg.run.seed, "samples")
    if condition is not None:  # those of the held-out images in turn
        condition = condition[torch.arange(count) % len(condition)].to(device)
    z = sample_latents(modules["latent_model"], sampling_diffusion(cfg, quick=True), latents.mean.to(device),
                       latents.std.to(device), generators, tick, condition)
    size = (decoder_cfg.data.img_size, decoder_cfg.data.img_size)
    images = decode(autoencoder["decoder"], sampling_diffusion(decoder_cfg, quick=True), z, size, generators,
                    decoder_cfg.data.channels, progress=tick, condition=condition)
    return {"samples": tile(to_uint8(images), max(1, round(len(images) ** 0.5)))}


def main():
    cfg, decoder_cfg = config.read_latent_config(CONFIG), config.read_trained_autoencoder_config(DECODER_CONFIG)
    config.check_same_latent(cfg, decoder_cfg)
    device = resolve_device(cfg.run.device)
    check_wandb(cfg.run)
    config.micro_batch_size(cfg)  # raises if it is no whole number
    diffusion = build_diffusion(cfg)
    timesteps = build_timestep_sampler(cfg)
    autoencoder, conditions = load_autoencoder(decoder_cfg, device)
    followed = None if decoder_cfg.model.condition == "decoder" else conditions
    torch.manual_seed(rng.seed_of(cfg.run.seed, "initial weights"))
    modules = nn.ModuleDict({"latent_model": build_latent_model(cfg, followed)})
    encoder, dtype = autoencoder["encoder"], resolve_dtype(decoder_cfg.train, device)
    datasets = build_dataset(decoder_cfg, train=True), build_dataset(decoder_cfg, train=False)
    if conditions and not conditions.same(datasets[0].conditions):
        raise UserError("decoder_config: the images have other conditions than the autoencoder was trained on "
                        f"({conditions.describe()}); restore them, or train it again")
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
    condition = [one if one is None else one.to(device) for one in (latents.train_condition, latents.heldout_condition)]
    trainer.train(
        batches=lambda step: latent_batches(train_set, cfg, step, condition[0]),
        validate=lambda ema: validation_loss(ema, heldout, diffusion, condition[1]),
        plot=lambda ema, tick: pictures(ema, autoencoder, latents, cfg, decoder_cfg, device, tick),
        plot_steps=sum(sampling_diffusion(one, quick=True).evaluations for one in (cfg, decoder_cfg)))
    cli.point_to_report()


if __name__ == "__main__":
    cli.run(main, shared=True)
