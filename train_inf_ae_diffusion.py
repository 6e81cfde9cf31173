"""Stage 1: train the mollified diffusion autoencoder on random subsets of pixels.

    python train_inf_ae_diffusion.py --config configs/ffhq_256_config.py --config.run.experiment=ffhq_mollified_256
"""

import functools

import torch
from torch import nn
from torch.utils.data import Subset

from data.conditions import dropped
from data.coordinates import Coordinates
from data.datasets import build_dataset, log_images
from data.loader import all_batches, training_batches
from diffusion.gaussian_diffusion import build_diffusion, sampling_diffusion
from diffusion.sampling import decode, encode
from diffusion.timestep_samplers import build_timestep_sampler
from models.build import build_decoder, build_encoder
from utils import cli, config, rng
from utils.device import resolve_device
from utils.images import tile, to_uint8
from utils.logging import check_wandb
from utils.trainer import Trainer

CONFIG = config.define_config_flag("config", "autoencoder config, for example configs/ffhq_256_config.py")
VALIDATION_IMAGES = 256
TIME_BINS = 4  # parts of the chain with a validation loss each


def denoising_terms(modules, diffusion, cfg, images, t, stream, condition=None):
    """Terms of the stage-1 loss, each [B], for images [B, C, H, W] at time steps t [B] (docs/method.md, 3.4).

    The encoder sees one random subset of the pixels and the decoder denoises another: E ‖f_θ(x_t, t, z) − Tξ‖² over
    the decoder's subset, z = encoder(x_0 at the encoder's subset).
    stream     purpose -> one generator per image
    condition  of the images (data.conditions); None: none
    """
    def subset(purpose):
        return Coordinates.random(len(images), images.shape[-2:], cfg.mc_integral.q_sample, cfg.mc_integral.type,
                                  stream(purpose), images.device)

    seen = subset("encoder coordinates")
    if cfg.model.stochastic_encoding:
        drawn = rng.randn((len(images), cfg.model.z_dim), stream("stochastic encoding"), images.device)
        z, *posterior = modules["encoder"](seen.gather(images), seen, drawn)
    else:
        z, posterior = modules["encoder"](seen.gather(images), seen), None
    coords = subset("decoder coordinates")
    noise = rng.randn(images.shape, stream("noise"), images.device)
    terms = diffusion.training_losses(lambda values, time: modules["decoder"](values, time, z, coords,
                                                                                  condition=condition),
                                      images, t, coords, noise)
    if posterior:
        mu, logvar = posterior
        terms["kld"] = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        terms["loss"] = terms["loss"] + cfg.model.kld_weight * terms["kld"]
    return terms


def training_loss(modules, batch, step, diffusion, timesteps, cfg):
    """{"loss": mean loss of a batch at random time steps, and the means of its terms}, scalars."""
    stream = functools.partial(rng.sample_generators, batch.images.device, batch.index, cfg.run.seed)
    t, weights = timesteps.sample(rng.rand((len(batch.images), 2), stream("t"), batch.images.device), step)
    condition = batch.condition
    if condition is not None:
        uniform = rng.rand((len(condition),), stream("condition dropout"), condition.device)
        condition = dropped(condition, uniform, cfg.model.condition_dropout)
    terms = denoising_terms(modules, diffusion, cfg, batch.images, t, stream, condition)
    timesteps.record(t, terms["loss"])
    return {**{name: value.mean() for name, value in terms.items()}, "loss": (weights * terms["loss"]).mean()}


def validation_loss(modules, dataset, batch_size, diffusion, cfg, device):
    """Mean loss over held-out images at fixed time steps, noise and coordinates, comparable between steps and runs, and
    over each quarter of the chain, validation_loss_q1 (least noise) to q4."""
    losses, steps = [], []
    for images, index, condition in all_batches(dataset, batch_size, device):
        steps.append(index.to(device) * diffusion.num_steps // len(dataset))  # evenly over [0, T)
        stream = functools.partial(rng.sample_generators, device, index, "validation")
        losses.append(denoising_terms(modules, diffusion, cfg, images, steps[-1], stream, condition)["loss"])
    losses, bins = torch.cat(losses), torch.cat(steps) * TIME_BINS // diffusion.num_steps
    figures = {f"validation_loss_q{i + 1}": losses[bins == i].mean().item() for i in bins.unique().tolist()}
    return {"validation_loss": losses.mean().item(), **figures}


def pictures(modules, dataset, diffusion, cfg, device, tick):
    """Held-out images above their reconstructions, and samples from latents drawn near those of the images: uint8."""
    images, index, condition = next(all_batches(dataset, min(cfg.train.sample_size, len(dataset)), device))
    z = encode(modules["encoder"], images)
    size, channels = images.shape[-2:], images.shape[1]

    def show(z, purpose):
        generators = rng.sample_generators(device, index, cfg.run.seed, purpose)
        return decode(modules["decoder"], diffusion, z, size, generators, channels, progress=tick, condition=condition)

    pairs = torch.cat([images, show(z, "reconstruction")])
    spread = (z - z.mean(0)).square().mean(0).sqrt()
    drawn = z.mean(0) + spread * rng.randn(z.shape, rng.sample_generators(device, index, "z"), device)
    return {"reconstructions": tile(to_uint8(pairs), len(images)),
            "samples": tile(to_uint8(show(drawn, "samples")), max(1, round(len(images) ** 0.5)))}


def main():
    cfg = config.read_autoencoder_config(CONFIG)
    device = resolve_device(cfg.run.device)
    check_wandb(cfg.run)
    batch_size = config.micro_batch_size(cfg)
    diffusion = build_diffusion(cfg)
    timesteps = build_timestep_sampler(cfg)
    train_set, heldout = build_dataset(cfg, train=True), build_dataset(cfg, train=False)
    modules = build_modules(cfg, train_set.conditions)
    config.check_batch_fits(cfg, len(train_set), "images")
    log_images(train_set, heldout)
    shown = Subset(heldout, range(min(VALIDATION_IMAGES, len(heldout))))
    plot_diffusion = sampling_diffusion(cfg, quick=True)

    trainer = Trainer(cfg, "autoencoder", modules,
                      functools.partial(training_loss, diffusion=diffusion, timesteps=timesteps, cfg=cfg), device,
                      state={"timesteps": timesteps}, after_step=timesteps.end_step, best="validation_loss",
                      best_from=timesteps.settled, source=f"{train_set.fingerprint()} {heldout.fingerprint()}",
                      facts={"conditions": list(train_set.conditions)} if train_set.conditions else {})
    trainer.train(
        batches=lambda step: training_batches(train_set, cfg.train.batch_size, cfg.run.seed, start_step=step,
                                              num_workers=cfg.data.num_workers, device=device,
                                              accumulation_steps=cfg.train.accumulation_steps),
        validate=lambda ema: validation_loss(ema, shown, batch_size, diffusion, cfg, device),
        plot=functools.partial(pictures, dataset=shown, cfg=cfg, device=device,
                               diffusion=plot_diffusion),
        plot_steps=2 * plot_diffusion.evaluations)  # of reconstructions, and of samples
    cli.point_to_report()


def build_modules(cfg, conditions=None):
    """Encoder and decoder, initialised as a function of run.seed; conditions: those of the training images."""
    torch.manual_seed(rng.seed_of(cfg.run.seed, "initial weights"))
    return nn.ModuleDict({"encoder": build_encoder(cfg), "decoder": build_decoder(cfg, conditions)})


if __name__ == "__main__":
    cli.run(main, shared=True)
