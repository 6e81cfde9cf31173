"""Checkpoint files: written whole or not at all, verified when read, loaded without executing anything in them.

A checkpoint is a file of torch.save, which torch.load(path, weights_only=True) reads as well, followed by its digest.
CheckpointFolder keeps those of a run. A file of weights is the EMA alone, as safetensors, for sampling and for others.
"""

import hashlib
import json
import logging
import os
import pickle
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from utils.device import environment
from utils.errors import UserError
from utils.files import replacing, sync_folder

FORMAT = 3  # raised when older checkpoints no longer mean the same networks
MARK = b"\nblake2b "  # before the digest, 64 hexadecimal digits at the end of the file
CHUNK = 1 << 24
TRAINED_BY = {"autoencoder": "train_inf_ae_diffusion.py", "latent": "train_latent_diffusion.py"}  # by kind


class DamagedCheckpoint(UserError):
    """The file is truncated, changed, or of something else. `what` is the message without the remedy."""

    def __init__(self, what):
        super().__init__(f"{what}; restore it, or start again in another run.experiment")
        self.what = what


def save_checkpoint(path, state, displaced=None):
    """Write `state` (nested dicts and lists of tensors, numbers and strings) and the environment to `path`.

    It is on disk before it replaces an older file, so neither a killed process nor a power failure leaves half of one.
    OSError if it cannot be written; the older file then stays.
    displaced    new name of the older file, which is removed otherwise
    """
    path = Path(path)
    try:
        with replacing(path) as temporary:
            _write(temporary, {"format": FORMAT, "environment": environment(), **state})
            if displaced is not None:
                os.replace(path, displaced)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); the files saved before are unchanged. "
                      "Correct this and give the same command again") from error


def _write(path, state):
    with open(path, "wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save(state, hashed)
        except RuntimeError as error:  # PyTorch's error for a failed write
            raise hashed.error or error from error
        file.write(MARK + hashed.digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


class _HashedFile:
    """A writable file that keeps the digest of its content, and the error of a failed write."""

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
    """The content of a file of `save_checkpoint`. UserError if the file is missing or of another kind or format; its
    subclass DamagedCheckpoint if it is damaged.

    Tensors are on the CPU, mapped from the file: they take memory only when they are read, once for all ranks of a
    machine, until the last of them is gone.
    """
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
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")  # Windows locks the file
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpoint(f"{path} is not a readable checkpoint ({reason[:100]})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        commit = state.get("environment", {}).get("commit") if isinstance(state, dict) else ""
        raise UserError(f"{path} has checkpoint format {found}, this code reads format {FORMAT}, because the networks "
                        "have changed; train again in another run.experiment, or go back to the code that wrote it"
                        + (f" (commit {commit})" if commit else ""))
    if kind is not None and state.get("kind") != kind:
        raise UserError(f"{path} holds a {state.get('kind')}, not a {kind}; check run.experiment")
    return state


def _check_digest(path):
    """ValueError unless the file ends with the digest of everything before it."""
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
    """Hexadecimal digest of the contents of a checkpoint or a file of weights; a copy has the same."""
    with open(path, "rb") as file:
        file.seek(-min(len(MARK) + 2 * _new_digest().digest_size, os.path.getsize(path)), os.SEEK_END)
        end = file.read()
        if end.startswith(MARK):
            return end[len(MARK):].decode()
        file.seek(0)
        digest = _new_digest()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest(weights):
    """Hexadecimal digest of a state dict."""
    result = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        result.update(name.encode())
        result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()


def load_weights(module, state, path):
    """Strictly load a state dict. UserError naming the first tensor that differs, with both shapes."""
    own = module.state_dict()
    for name in [*own, *state]:
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(state[name].shape) if name in state else "absent"
        if here != there:
            raise UserError(f"{path} does not fit the config: {name} is {there} in the checkpoint and {here} in the "
                            "model; use the config that the run was trained with (config.json beside the checkpoint)")
    module.load_state_dict(state)


def architecture_fields(config):
    """(section, name) of the fields of a config, also as nested dicts, on which a network or its target depends."""
    for section, names in (("data", ("img_size", "channels", "condition")), ("model", None), ("diffusion", None)):
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


class CheckpointFolder:
    """The checkpoints of a run in `folder`: <name>.pt, the newest; <name>.<step>.pt, earlier ones; best_<name>.pt.

    filename    <name>.pt
    keep        number of checkpoints to keep, including the newest and excluding the best

    A file appears under its name whole or not at all, and an old one is removed only once newer ones are on disk: a
    process that is killed at any instant leaves a checkpoint to resume from. Saving copies the state to host memory,
    and a thread writes it; the next call raises any error of that thread.
    """

    def __init__(self, folder, filename, keep):
        self.newest = Path(folder) / filename
        self.best = self.newest.with_name(f"best_{filename}")
        self.keep = keep
        self._step = None  # of the file `newest`; None if there is none or it is damaged
        self._thread = ThreadPoolExecutor(max_workers=1)  # at exit, Python waits for its work
        self._writing = None

    def exists(self):
        """True if there is a checkpoint to resume from, unless it is damaged."""
        return self.newest.exists() or bool(older_checkpoints(self.newest))

    def load(self, kind):
        """(newest undamaged state, its path); see load_newest."""
        state, path = load_newest(self.newest, kind)
        self._step = state["step"] if path == self.newest else None
        return state, path

    def save(self, state):
        """Start to write a state, a dict with "step", as the newest."""
        self._start(self._write, state)

    def save_best(self, state):
        """Start to write the best state."""
        self._start(save_checkpoint, self.best, state)

    def check(self):
        """Raise the OSError of a failed write; does not wait for one in progress."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self):
        """Wait until everything is on disk. OSError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _start(self, write, *arguments):
        self.wait()
        self._writing = self._thread.submit(write, *to_host(arguments))

    def _write(self, state):
        step, before = state["step"], self._step
        displaced = None
        if self.keep > 1 and before not in (None, step):
            displaced = self.newest.with_name(f"{self.newest.stem}.{before}{self.newest.suffix}")
        save_checkpoint(self.newest, state, displaced)
        self._step = step
        older = older_checkpoints(self.newest)
        # files of later steps remain if the run went back to an earlier one because the newest was damaged
        kept = [s for s in older if s < step][:self.keep - 1]
        for path in (older[s] for s in older if s not in kept):
            path.unlink(missing_ok=True)


def older_checkpoints(newest):
    """{step: path} of the checkpoints before the file `newest`, latest first; `newest` need not exist."""
    pattern = re.compile(rf"{re.escape(newest.stem)}\.(\d+){re.escape(newest.suffix)}")
    found = {int(match[1]): path for path in newest.parent.glob(f"{newest.stem}.*{newest.suffix}")
             if (match := pattern.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def load_newest(newest, kind):
    """(state, path) of the file `newest`. If it is damaged or missing, of the latest undamaged one before it, with a
    warning. UserError if there is none, or it is of another kind (see load_checkpoint)."""
    problem, older = None, older_checkpoints(newest)
    for path in [newest, *older.values()]:
        if path == newest and not path.exists() and older:
            problem = DamagedCheckpoint(f"{newest} is missing")
            continue
        try:
            state = load_checkpoint(path, kind)
        except DamagedCheckpoint as error:
            problem = problem or error
            continue
        if problem is not None:
            logging.warning("%s; using the one before it, %s of step %d", problem.what, path, state["step"])
        return state, path
    if older:
        names = " or ".join(path.name for path in older.values())
        raise DamagedCheckpoint(f"{problem.what}, and neither can {names} be read") from problem
    raise problem


def to_host(value):
    """A copy of nested dicts, lists and tuples, with their tensors in host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_host, value))
    return value


WEIGHTS_FORMAT = "infty_diff 2"  # raised with FORMAT
_FACTS = "facts."
_HEADER = ("kind", "step", "config", "environment")


def save_weights(path, saved):
    """Write what sampling needs of `saved`, the result of load_checkpoint.

    Tensors have the names of the networks; facts that are tensors are named facts.<name>. The rest is JSON in the
    header: kind, step, config, environment, facts.
    """
    facts = saved["facts"]
    tensors = {**saved["ema"], **{_FACTS + name: fact for name, fact in facts.items() if torch.is_tensor(fact)}}
    header = {name: saved[name] for name in _HEADER}
    header["facts"] = {name: fact for name, fact in facts.items() if not torch.is_tensor(fact)}
    header = {name: json.dumps(value) for name, value in header.items()}
    content = save({name: tensor.clone().contiguous() for name, tensor in tensors.items()},
                   {"format": "pt", "written_by": WEIGHTS_FORMAT, **header})
    with replacing(path) as temporary:
        temporary.write_bytes(content)  # save_file would make it readable by this user alone


def load_weights_file(path, kind):
    """{"kind", "step", "config", "environment", "facts", "ema"} of a file of save_weights, on the CPU.

    UserError if something else wrote it or it is of another kind; DamagedCheckpoint if it is not readable.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path} is not a readable file of weights ({error})") from error
    if metadata.get("written_by") != WEIGHTS_FORMAT:
        raise UserError(f"{path} was written by {metadata.get('written_by')}, this code reads {WEIGHTS_FORMAT}; "
                        "export it again with experiments/export_weights.py, from a run of this code")
    try:
        saved = {name: json.loads(metadata[name]) for name in (*_HEADER, "facts")}
    except (KeyError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is not a readable file of weights (in its header, {error})") from error
    if saved["kind"] != kind:
        raise UserError(f"{path} holds a {saved['kind']}, not a {kind}; check run.experiment")
    saved["facts"] |= {name.removeprefix(_FACTS): t for name, t in tensors.items() if name.startswith(_FACTS)}
    saved["ema"] = {name: tensor for name, tensor in tensors.items() if not name.startswith(_FACTS)}
    return saved
