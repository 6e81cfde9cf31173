"""Config flags, and the checks of every field: which fields exist, their types and their ranges.

The code that uses a name (a data set, a schedule, a backend) checks it.
"""

import difflib
import json
import math
import os
import runpy
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs.defaults import autoencoder_config, latent_config
from utils import distributed
from utils.checkpoint import architecture_fields
from utils.errors import UserError
from utils.files import TEXT

MAX_NAME = 255  # bytes of a file name
PATHS = ("run.output_dir", "run.wandb_dir", "data.root_dir", "data.condition_source")

# Smallest allowed value of a number, if it is not 1 for an integer and 0 for a float.
AT_LEAST = {
    "run.seed": 0, "data.img_size": 16, "data.num_workers": 0, "train.plot_samples_steps": 0,
    "model.time_emb_dim": 2, "model.uno_dropout_from_resolution": 0, "model.z_dim": 0, "model.num_layers": 2,
    "model.time_embed_dim": 2, "diffusion.data_std": 1e-3, "diffusion.multiscale_max_img_size": 8,
    "optimizer.warmup_steps": 0,
}
BELOW = {"train.ema_decay": 1.0, "model.uno_dropout": 1.0, "model.dropout": 1.0, "model.condition_dropout": 1.0,
         "optimizer.adam_beta1": 1.0, "optimizer.adam_beta2": 1.0}
ONE_OF = {
    "run.wandb_mode": ("online", "offline", "disabled"),
    "optimizer.decay": ("none", "cosine"),
    "train.precision": ("auto", "bf16", "fp16", "fp32"),
    "train.nonfinite": ("stop", "skip"),
    "data.condition": ("none", "class", "vector"),
    "model.condition": ("both", "decoder", "latent"),
    "train.compile": ("auto", True, False),
    "diffusion.objective": ("ddpm", "flow", "few_step"),
    "diffusion.noise_schedule": ("cosine", "linear", "shifted_cosine", "const0.008"),
    "diffusion.schedule_sampler": ("uniform", "loss-second-moment"),
    "diffusion.loss_type": ("mse", "l1", "rescaled_mse"),
    "diffusion.mollifier_type": ("dct", "none"),
    "diffusion.model_mean_type": ("mollified_epsilon", "epsilon", "v", "xstart"),
    "model.operator": ("paper", "consistent"),
    "mc_integral.type": ("uniform", "halton", "stratified"),
}


def define_config_flag(name, what, default=None):
    """--<name>=configs/<file>.py, with --<name>.<section>.<field>=value for every field; default: path of a file."""
    holder = config_flags.DEFINE_config_file(name, default, f"{what}; --{name}.<section>.<field>=<value> sets a field")
    flags.FLAGS[name].parser = _ConfigFileParser()
    return holder


class _ConfigFileParser(flags.ArgumentParser):
    """Reports anything that a config file raises, which is the user's Python code, in one line."""

    def parse(self, path):
        try:
            config = runpy.run_path(path)["get_config"]()
            if not isinstance(config, ConfigDict):
                raise TypeError(f"get_config() returns a {type(config).__name__}, not a ConfigDict")
        except (Exception, SystemExit) as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            where = f" (line {lines[-1]})" if lines else ""
            raise ValueError(f"the config file could not be loaded: {type(error).__name__}: {error}{where}") from error
        return config.lock()


def read_autoencoder_config(flag):
    """The stage-1 config of a flag, checked. UserError if it is missing or invalid."""
    config = _value(flag)
    if "mc_integral" not in config:
        raise UserError(f"--{flag.name} is not an autoencoder config (it has no mc_integral section); "
                        "give one such as configs/ffhq_256_config.py")
    check_autoencoder_config(config, flag.name)
    return config


def read_latent_config(flag):
    """The stage-2 config of a flag, checked. UserError if it is missing or invalid."""
    config = _value(flag)
    if "mc_integral" in config:
        raise UserError(f"--{flag.name} is an autoencoder config (it has a mc_integral section); "
                        "give a latent config such as configs/ffhq_latent_config.py")
    _check(config, latent_config(), flag.name)
    return config


def read_trained_autoencoder_config(flag):
    """The stage-1 config of a flag, checked, with the architecture of its run if there is one.

    A script that samples takes the fields on which a network depends from config.json beside the checkpoint, so that
    the overrides of training need not be repeated. A field given on the command line stays, and is refused later if it
    differs (utils.checkpoint.check_same_architecture).
    """
    config = read_autoencoder_config(flag)
    if _take_architecture(config, flag):
        check_autoencoder_config(config, flag.name)
    return config


def read_trained_latent_config(flag):
    """As read_trained_autoencoder_config, for stage 2."""
    config = read_latent_config(flag)
    if _take_architecture(config, flag):
        _check(config, latent_config(), flag.name)
    return config


def read_trained_stages(flag, decoder_flag):
    """(latent config or None, stage-1 config or None), as above, of a script that takes either kind as `flag`, and the
    stage-1 config of a latent one as `decoder_flag`."""
    if flag.value is not None and "mc_integral" in flag.value and decoder_flag.value is None:
        return None, read_trained_autoencoder_config(flag)
    return (None if flag.value is None else read_trained_latent_config(flag),
            None if decoder_flag.value is None else read_trained_autoencoder_config(decoder_flag))


def _value(flag):
    if flag.value is None:
        raise UserError(f"--{flag.name} is missing; give a config file such as --{flag.name} configs/demo_config.py")
    return flag.value


def _take_architecture(config, flag):
    """Set the fields that config.json of the run has with another value. True if there is a config.json."""
    path = run_dir(config) / "config.json"
    if not path.exists():
        return False
    given = config_flags.get_override_values(flags.FLAGS[flag.name])
    try:
        saved = json.loads(path.read_text(encoding=TEXT))
        for section, name in architecture_fields(config):
            value = saved[section].get(name, config[section][name])
            value = tuple(value) if isinstance(value, list) else value
            if f"{section}.{name}" not in given and config[section][name] != value:
                config[section][name] = value
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # that of JSON names the line
        raise UserError(f"{path} is not the config of a run ({type(error).__name__}: {error}); repair or remove it"
                        ) from error
    return True


def check_autoencoder_config(config, name):
    """UserError if a stage-1 config is invalid; `name` is that of its flag."""
    _check(config, autoencoder_config(64), name)
    pixels, q_sample = config.data.img_size ** 2, config.mc_integral.q_sample
    if not config.model.knn_neighbours <= q_sample <= pixels:
        raise UserError(f"{name}.mc_integral.q_sample={q_sample} must lie between {config.model.knn_neighbours}, "
                        f"model.knn_neighbours, and {pixels}, the pixels of data.img_size={config.data.img_size}")
    if config.data.name != "function" and config.data.channels not in (1, 3):
        raise UserError(f"{name}.data.channels={config.data.channels} must be 1 or 3 with data.name="
                        f"{config.data.name!r}; only functions have another number of channels")
    if config.model.kernel_size % 2 == 0:
        raise UserError(f"{name}.model.kernel_size={config.model.kernel_size} must be odd")
    if config.model.stochastic_encoding and not config.model.z_dim:
        raise UserError(f"{name}.model.stochastic_encoding=True needs an encoder; set model.z_dim, or turn it off")
    if config.data.condition != "none" and config.model.condition == "latent" and not config.model.z_dim:
        raise UserError(f"{name}.model.condition='latent' needs an encoder; set model.z_dim, or use decoder")


def check_same_latent(config, decoder_config):
    """UserError unless latent model and autoencoder agree on the length of z and use different run folders."""
    if config.model.z_dim != decoder_config.model.z_dim:
        raise UserError(f"config.model.z_dim={config.model.z_dim} differs from decoder_config.model.z_dim="
                        f"{decoder_config.model.z_dim}; set both to the value the autoencoder was trained with")
    if run_dir(config) == run_dir(decoder_config):
        raise UserError(f"config.run.experiment={config.run.experiment!r} is also that of the autoencoder; they would "
                        "overwrite each other's metrics, so choose another")


def micro_batch_size(config):
    """Samples per micro-batch: train.batch_size / (ranks · train.accumulation_steps). UserError unless it is whole."""
    train, processes = config.train, distributed.world_size()
    parts = processes * train.accumulation_steps
    if train.batch_size % parts:
        raise UserError(f"config.train.batch_size={train.batch_size} must be a multiple of {parts}, the number of "
                        f"processes ({processes}) times config.train.accumulation_steps={train.accumulation_steps}; "
                        "change one of them")
    return train.batch_size // parts


def check_batch_fits(config, count, items):
    """UserError if a batch is larger than the training set of `count` items, and would hold some of them twice."""
    if config.train.batch_size > count:
        raise UserError(f"config.train.batch_size={config.train.batch_size} is more than the {count} {items} to train "
                        "on; lower it, or add images")


def _check(config, defaults, flag_name):
    """Expand ~ in paths. UserError for a field that is unknown, missing, or of a wrong type or value."""
    for name, value in _leaves(config):
        default = _lookup(defaults, name)
        where = f"{flag_name}.{name}={value!r}"
        if default is None:
            near = difflib.get_close_matches(name, [known for known, _ in _leaves(defaults)], n=1)
            raise UserError(f"{where} is not a known field" + (f"; did you mean {near[0]}?" if near else ""))
        if name in ONE_OF:
            if value not in ONE_OF[name]:
                raise UserError(f"{where} must be one of {', '.join(map(str, ONE_OF[name]))}")
        elif not _same_type(value, default):
            kind = "tuple of int" if isinstance(default, tuple) else type(default).__name__
            raise UserError(f"{where} must be of type {kind}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where} must be a finite number")
        least = AT_LEAST.get(name, {int: 1, float: 0.0}.get(type(default)))
        if least is not None and value < least:
            raise UserError(f"{where} must be at least {least}")
        if name in BELOW and not value < BELOW[name]:
            raise UserError(f"{where} must be below {BELOW[name]}")
    missing = [name for name, _ in _leaves(defaults) if isinstance(_lookup(config, name), (ConfigDict, type(None)))]
    if missing:
        raise UserError(f"--{flag_name} lacks {missing[0]}; start from a function of configs/defaults.py")
    for name in PATHS:
        section, field = name.split(".")
        if field in config[section]:
            config[section][field] = os.path.expanduser(config[section][field])
    experiment = config.run.experiment
    parts = Path(experiment).parts
    if not parts or Path(experiment).is_absolute() or ".." in parts or experiment == "None" or any(
            len(os.fsencode(part)) > MAX_NAME for part in parts):
        raise UserError(f"{flag_name}.run.experiment={experiment!r} must be the name of a folder below run.output_dir, "
                        f"of at most {MAX_NAME} bytes and not None")


def _leaves(config, prefix=""):
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _lookup(config, name):
    for key in name.split("."):
        if not isinstance(config, ConfigDict) or key not in config:
            return None
        config = config[key]
    return config


def _same_type(value, default):
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and all(isinstance(item, int) for item in value)
    return isinstance(value, type(default))


def run_dir(config):
    """Folder of a run, <output_dir>/<experiment>."""
    return Path(config.run.output_dir) / config.run.experiment


def changed_fields(values, defaults):
    """[(field, default, value)] for the fields in which a config, as nested dicts (config.json), differs from
    `defaults`, a ConfigDict."""
    changed = []
    for name, default in _leaves(defaults):
        section, field = name.split(".")
        value = values.get(section, {}).get(field, default)
        if list(value) != list(default) if isinstance(default, tuple) else value != default:
            changed.append((name, default, value))
    return changed
