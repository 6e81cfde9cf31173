"""Trained models from the checkpoints of a run: EMA weights, in eval mode, ready for sampling."""

from torch import nn

from models.build import build_decoder, build_encoder, build_latent_model
from utils.checkpoint import check_same_architecture, digest, load_checkpoint, load_weights
from utils.config import run_dir
from utils.errors import UserError


def autoencoder_path(config):
    """Checkpoint that a stage-1 run is sampled from."""
    return run_dir(config) / "checkpoint.pt"


def latent_path(config):
    """Checkpoint that a stage-2 run is sampled from: the best by held-out loss."""
    return run_dir(config) / "best_latent_checkpoint.pt"


def load_autoencoder(config, device):
    """nn.ModuleDict with "encoder" and "decoder" of a stage-1 run; UserError where its checkpoint does not fit."""
    modules = nn.ModuleDict({"encoder": build_encoder(config), "decoder": build_decoder(config)})
    _load(modules, config, autoencoder_path(config), "autoencoder")
    return _frozen(modules, device)


def load_latent_model(config, device, encoder):
    """(latent model, mean [Z], std [Z]) of a stage-2 run, from its best checkpoint by held-out loss.

    mean and std are those of the training latents: z · std + mean brings samples to the encoder's units.
    UserError where it was trained on latents of another encoder than this one.
    """
    modules = nn.ModuleDict({"latent_model": build_latent_model(config)})
    facts = _load(modules, config, latent_path(config), "latent")
    if facts["encoder"] != digest(encoder.state_dict()):
        raise UserError(f"{latent_path(config)} was trained on latents of another encoder than that of "
                        "--decoder_config; train the latent model again, in another run.experiment")
    return _frozen(modules, device)["latent_model"], facts["mean"].to(device), facts["std"].to(device)


def _load(modules, config, path, kind):
    saved = load_checkpoint(path, kind)
    check_same_architecture(saved["config"], config.to_dict(), path)
    load_weights(modules, saved["ema"], path)
    return saved["facts"]


def _frozen(modules, device):
    return modules.to(device).eval().requires_grad_(False)
