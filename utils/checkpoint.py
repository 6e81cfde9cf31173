"""Checkpoints on disk: written whole or not at all, loaded without running anything that is in them."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import torch

from utils.errors import UserError
from utils.files import replacing

FORMAT = 1


def save_checkpoint(path, state):
    """Write `state` (nested dicts and lists of tensors, numbers and strings) to `path`.

    It is on the disk before it takes the place of an older file, so that neither a killed process nor a power failure
    leaves half of one. OSError where the disk is full or the folder not writable.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    if os.name == "nt":  # folders cannot be flushed there
        return
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path, kind=None):
    """What `save_checkpoint` wrote, on the CPU. UserError where the file is missing, broken or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; train it first, or set run.output_dir and run.experiment "
                        "to those of the training run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable checkpoint ({reason[:100]}); "
                        "restore it, or remove it to start again") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} has checkpoint format {found}, this code reads format {FORMAT}")
    if kind is not None and state.get("kind") != kind:
        raise UserError(f"{path} holds a {state.get('kind')}, not a {kind}; check run.experiment")
    return state


def identity(path):
    """Short text that changes when the file does: its path, size and time of change."""
    status = Path(path).stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def digest(weights):
    """Hexadecimal digest of a state dict."""
    result = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        result.update(name.encode())
        result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()


def load_weights(module, state, path):
    """Strictly load a state dict; a UserError names the first tensor that differs, with both shapes."""
    own = module.state_dict()
    for name in [*own, *state]:
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(state[name].shape) if name in state else "absent"
        if here != there:
            raise UserError(f"{path} does not fit the config: {name} is {there} in the checkpoint and {here} in the "
                            "model; use the config that the run was trained with (config.json beside the checkpoint)")
    module.load_state_dict(state)


def check_same_architecture(saved, current, path):
    """UserError naming the first field that differs between two configs (as dicts) and that a network depends on."""
    for section, names in (("data", ("img_size", "channels")), ("model", None), ("diffusion", None)):
        for name, value in current.get(section, {}).items():
            before = saved.get(section, {}).get(name)
            relevant = name in names if names else name not in ("backend", "attention")
            if relevant and _plain(before) != _plain(value):
                other = "; another size is sampled with --sample_img_size" if name == "img_size" else ""
                raise UserError(f"{path} was trained with {section}.{name}={before!r}, the config has {value!r}; "
                                f"use the same value, or another run.experiment{other}")


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
