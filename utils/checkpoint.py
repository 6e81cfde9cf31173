"""The file of a checkpoint: written whole or not at all, checked when read, loaded without running what is in it.

It is a file of torch.save, which torch.load(path, weights_only=True) reads as well, followed by its own digest.
"""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import torch

from utils.environment import environment
from utils.errors import UserError
from utils.files import replacing, sync_folder

FORMAT = 2
MARK = b"\nblake2b "  # before the digest, 64 hexadecimal digits, at the end of the file
CHUNK = 1 << 24
TRAINED_BY = {"autoencoder": "train_inf_ae_diffusion.py", "latent": "train_latent_diffusion.py"}  # by the kind


class DamagedCheckpoint(UserError):
    """The file is not what was written: truncated, changed, or of something else. `what` is the message without the
    remedy."""

    def __init__(self, what):
        super().__init__(f"{what}; restore it, or start again in another run.experiment")
        self.what = what


def save_checkpoint(path, state, displaced=None):
    """Write `state` (nested dicts and lists of tensors, numbers and strings) and where it was made to `path`.

    It is on the disk before it takes the place of an older file, so that neither a killed process nor a power failure
    leaves half of one. OSError where the disk is full or the folder not writable; the older file then stays.
    displaced    name that the older file gets; by default it is gone
    """
    path = Path(path)
    try:
        with replacing(path) as temporary:
            _write(temporary, {"format": FORMAT, "environment": environment(), **state})
            if displaced is not None:
                os.replace(path, displaced)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); what was saved before is as it was. "
                      "Mend that and give the same command again") from error


def _write(path, state):
    with open(path, "wb") as file:
        hashed = _Hashed(file)
        try:
            torch.save(state, hashed)
        except RuntimeError as error:  # torch's word for a write that failed
            raise hashed.error or error from error
        file.write(MARK + hashed.digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


class _Hashed:
    """A file to write to that keeps the digest of what was written, and the error if that failed."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, _new_digest(), None

    def write(self, data):
        try:
            count = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return count

    def flush(self):
        self.file.flush()


def _new_digest():
    return hashlib.blake2b(digest_size=32)


def load_checkpoint(path, kind=None):
    """What `save_checkpoint` wrote, on the CPU. UserError where the file is missing or of another kind or format;
    its subclass DamagedCheckpoint where it is damaged."""
    path = Path(path)
    if path.is_dir():
        raise DamagedCheckpoint(f"{path} is a folder, not a checkpoint")
    if not path.is_file():
        script = f" with {TRAINED_BY[kind]}" if kind in TRAINED_BY else ""
        where = f"{kind} config" if kind else "config"
        raise UserError(f"there is no checkpoint {path}; train it first{script}, or set run.output_dir and "
                        f"run.experiment of the {where} to those of the training run")
    try:
        _check_digest(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpoint(f"{path} is not a readable checkpoint ({reason[:100]})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} has checkpoint format {found}, this code reads format {FORMAT}")
    if kind is not None and state.get("kind") != kind:
        raise UserError(f"{path} holds a {state.get('kind')}, not a {kind}; check run.experiment")
    return state


def _check_digest(path):
    """ValueError unless the file ends with the digest of all before."""
    digest = _new_digest()
    left = path.stat().st_size - len(MARK) - 2 * digest.digest_size
    with open(path, "rb") as file:
        while left > 0:
            chunk = file.read(min(CHUNK, left))
            digest.update(chunk)
            left -= len(chunk)
        end = file.read()
    if end[:len(MARK)] != MARK:
        raise ValueError("no checksum at its end: cut short, or written by something else")
    if end[len(MARK):] != digest.hexdigest().encode():
        raise ValueError("its checksum is wrong: it has changed since it was written")


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


def architecture_fields(config):
    """(section, name) of the fields of a config, also one as dicts, on which a network or what it predicts depends."""
    for section, names in (("data", ("img_size", "channels")), ("model", None), ("diffusion", None)):
        for name in config.get(section, {}):
            if name in names if names else name not in ("backend", "attention"):
                yield section, name


def check_same_architecture(saved, current, path):
    """UserError naming the first field that differs between two configs (as dicts) and that a network depends on."""
    for section, name in architecture_fields(current):
        before, value = saved.get(section, {}).get(name), current[section][name]
        if _plain(before) != _plain(value):
            other = "; another size is sampled with --sample_img_size" if name == "img_size" else ""
            raise UserError(f"{path} was trained with {section}.{name}={before!r}, the config has {value!r}; "
                            f"use the same value, or another run.experiment{other}")


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
