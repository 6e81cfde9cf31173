"""Trained models from the files of a run: EMA weights, in eval mode, ready for sampling.

Their parameters go on requiring gradients, though sampling computes none: autocast keeps what it has cast of such ones
alone, and would cast others anew in every evaluation. Who differentiates in something else turns that off.
"""

from torch import nn

from models.build import build_decoder, build_encoder, build_latent_model
from utils.checkpoint import (
    check_same_architecture,
    digest,
    load_newest,
    load_weights,
    load_weights_file,
    older_checkpoints,
)
from utils.config import run_dir
from utils.errors import UserError


def autoencoder_path(config):
    """File that a stage-1 run is sampled from: its newest checkpoint, or weights.safetensors where there is none."""
    return _first_there(run_dir(config) / "checkpoint.pt", run_dir(config) / "weights.safetensors")


def latent_path(config):
    """File that a stage-2 run is sampled from: its best checkpoint by held-out loss, or latent_weights.safetensors."""
    return _first_there(run_dir(config) / "best_latent_checkpoint.pt", run_dir(config) / "latent_weights.safetensors")


def load_autoencoder(config, device):
    """nn.ModuleDict with "encoder" and "decoder" of a stage-1 run; UserError where its file does not fit the config."""
    modules = nn.ModuleDict({"encoder": build_encoder(config), "decoder": build_decoder(config)})
    _load(modules, config, autoencoder_path(config), "autoencoder")
    return modules.to(device).eval()


def load_latent_model(config, device, encoder):
    """(latent model, mean [Z], std [Z]) of a stage-2 run, from its best checkpoint by held-out loss.

    mean and std are those of the training latents: z · std + mean brings samples to the encoder's units.
    UserError where it was trained on latents of another encoder than this one.
    """
    modules = nn.ModuleDict({"latent_model": build_latent_model(config)})
    facts = _load(modules, config, latent_path(config), "latent")
    if facts["encoder"] != digest(encoder.state_dict()):
        raise UserError(f"{latent_path(config)} was trained on latents of another encoder than that of "
                        "--decoder_config; train the latent model again, in another run.experiment (or, where a "
                        "damaged checkpoint was passed over, train the autoencoder to where it was)")
    return modules["latent_model"].to(device).eval(), facts["mean"].to(device), facts["std"].to(device)


def load_trained(path, kind, config):
    """What a file of autoencoder_path or latent_path holds, of which "ema", "config" and "facts" are always there.

    UserError where it is of another kind, or of another architecture than that of `config`.
    """
    if path.suffix == ".safetensors":
        saved = load_weights_file(path, kind)
    else:
        saved, path = load_newest(path, kind)
    check_same_architecture(saved["config"], config.to_dict(), path)
    return saved


def _load(modules, config, path, kind):
    saved = load_trained(path, kind, config)
    load_weights(modules, saved["ema"], path)
    return saved["facts"]


def _first_there(checkpoint, weights):
    """The checkpoint, or the newest before it where it is gone, or the file of weights; if nothing is, the first."""
    found = [path for path in (checkpoint, *older_checkpoints(checkpoint).values(), weights) if path.exists()]
    return found[0] if found else checkpoint
