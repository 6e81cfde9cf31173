"""Trained models from the files of a run: EMA weights, in eval mode, ready for sampling.

Their parameters keep requires_grad, because autocast caches its casts of such parameters only. Disable it to
differentiate with respect to an input.
"""

from torch import nn

from data.conditions import Conditions
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
    """The file to sample a stage-1 run from: its newest checkpoint, otherwise its safetensors file."""
    return _first_there(run_dir(config) / "checkpoint.pt", run_dir(config) / "weights.safetensors")


def latent_path(config):
    """The file to sample a stage-2 run from: its best checkpoint by held-out loss, otherwise its safetensors file."""
    return _first_there(run_dir(config) / "best_latent_checkpoint.pt", run_dir(config) / "latent_weights.safetensors")


def load_autoencoder(config, device):
    """(nn.ModuleDict with "encoder" and "decoder", Conditions of its training images or None) of a stage-1 run.

    Raises UserError if they do not fit the config.
    """
    path = autoencoder_path(config)
    saved = load_trained(path, "autoencoder", config)
    conditions = saved["facts"].get("conditions")
    conditions = conditions and Conditions(*conditions)
    modules = nn.ModuleDict({"encoder": build_encoder(config), "decoder": build_decoder(config, conditions)})
    load_weights(modules, saved["ema"], path)
    return modules.to(device).eval(), conditions


def load_latent_model(config, device, encoder, conditions=None):
    """(latent model, mean [Z], std [Z]) of a stage-2 run, from its best checkpoint by held-out loss.

    mean and std are those of the training latents; z · std + mean maps samples to the encoder's units. Raises UserError
    if the model was trained on latents of another encoder.
    conditions   Conditions that the model follows, or None
    """
    path = latent_path(config)
    saved = load_trained(path, "latent", config)
    modules = nn.ModuleDict({"latent_model": build_latent_model(config, conditions)})
    load_weights(modules, saved["ema"], path)
    facts = saved["facts"]
    if facts["encoder"] != digest(encoder.state_dict()):
        raise UserError(f"{path} was trained on latents of another encoder than that of "
                        "--decoder_config; train the latent model again, with another run.experiment (or, if a "
                        "damaged checkpoint was skipped, train the autoencoder to the same step again)")
    return modules["latent_model"].to(device).eval(), facts["mean"].to(device), facts["std"].to(device)


def load_trained(path, kind, config):
    """Contents of a file of autoencoder_path or latent_path: at least "ema", "config" and "facts".

    Raises UserError if it is of another kind, or of another architecture than `config`.
    """
    if path.suffix == ".safetensors":
        saved = load_weights_file(path, kind)
    else:
        saved, path = load_newest(path, kind)
    check_same_architecture(saved["config"], config.to_dict(), path)
    return saved


def _first_there(checkpoint, weights):
    """The first file that exists: the checkpoint, older ones, the weights. If none does, the checkpoint."""
    found = [path for path in (checkpoint, *older_checkpoints(checkpoint).values(), weights) if path.exists()]
    return found[0] if found else checkpoint
