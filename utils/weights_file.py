"""The averaged weights of a run alone, as safetensors: what sampling needs, for others to use and to look into.

The names of the tensors are those of the networks; facts of the run that are tensors are named facts.<name>. All else
is JSON in the header: kind, step, config, facts, environment.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from utils.checkpoint import DamagedCheckpoint
from utils.errors import UserError
from utils.files import replacing

FORMAT = "infty_diff 1"
_FACTS = "facts."
_HEADER = ("kind", "step", "config", "environment")


def save_weights(path, saved):
    """Write what sampling needs of `saved`, which load_checkpoint gave."""
    facts = saved["facts"]
    tensors = {**saved["ema"], **{_FACTS + name: fact for name, fact in facts.items() if torch.is_tensor(fact)}}
    header = {name: saved[name] for name in _HEADER}
    header["facts"] = {name: fact for name, fact in facts.items() if not torch.is_tensor(fact)}
    header = {name: json.dumps(value) for name, value in header.items()}
    content = save({name: tensor.clone().contiguous() for name, tensor in tensors.items()},
                   {"format": "pt", "written_by": FORMAT, **header})  # "pt" is for others, who load it with PyTorch
    with replacing(path) as temporary:
        temporary.write_bytes(content)  # save_file would give it to this user alone


def load_weights_file(path, kind):
    """{"kind", "step", "config", "environment", "facts", "ema"} of a file of save_weights, on the CPU.

    UserError where it was written by something else or is of another kind; DamagedCheckpoint where it is not readable.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path} is not a readable file of weights ({error})") from error
    if metadata.get("written_by") != FORMAT:
        raise UserError(f"{path} was written by {metadata.get('written_by')}, this code reads {FORMAT}; make it with "
                        "experiments/export_weights.py")
    try:
        saved = {name: json.loads(metadata[name]) for name in (*_HEADER, "facts")}
    except (KeyError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is not a readable file of weights (in its header, {error})") from error
    if saved["kind"] != kind:
        raise UserError(f"{path} holds a {saved['kind']}, not a {kind}; check run.experiment")
    saved["facts"] |= {name.removeprefix(_FACTS): t for name, t in tensors.items() if name.startswith(_FACTS)}
    saved["ema"] = {name: tensor for name, tensor in tensors.items() if not name.startswith(_FACTS)}
    return saved
