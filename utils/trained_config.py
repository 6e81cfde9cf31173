"""Configs of runs that are there already: what a network depends on is as the run was trained.

A script that samples takes those fields from the run's config.json, beside its checkpoint, so that what was overridden
to train need not be said again. A field that the command line gives stands, and is refused later where it differs
(utils.checkpoint.check_same_architecture).
"""

import json

from absl import flags
from ml_collections import config_flags

from utils.checkpoint import architecture_fields
from utils.config import (
    check_autoencoder_config,
    check_latent_config,
    read_autoencoder_config,
    read_latent_config,
    run_dir,
)


def read_trained_autoencoder_config(flag):
    """The checked stage-1 config of a flag, as its run was trained where it has been; UserError as for any config."""
    config = read_autoencoder_config(flag)
    if _take_architecture(config, flag):
        check_autoencoder_config(config, flag.name)
    return config


def read_trained_latent_config(flag):
    """The checked stage-2 config of a flag, as its run was trained where it has been; UserError as for any config."""
    config = read_latent_config(flag)
    if _take_architecture(config, flag):
        check_latent_config(config, flag.name)
    return config


def read_trained_stages(flag, decoder_flag):
    """(latent config or None, stage-1 config or None), as above, of a script that takes either kind as `flag`, and the
    stage-1 config that belongs to a latent one as `decoder_flag`."""
    if flag.value is not None and "mc_integral" in flag.value and decoder_flag.value is None:
        return None, read_trained_autoencoder_config(flag)
    return (None if flag.value is None else read_trained_latent_config(flag),
            None if decoder_flag.value is None else read_trained_autoencoder_config(decoder_flag))


def _take_architecture(config, flag):
    """Set the fields of the config that config.json of its run has with another value; whether there is one."""
    try:
        saved = json.loads((run_dir(config) / "config.json").read_text())
        fields = [(section, name, saved[section][name]) for section, name in architecture_fields(config)
                  if name in saved[section]]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or a damaged one; the checkpoint has it as well
        return False
    given = config_flags.get_override_values(flags.FLAGS[flag.name])
    for section, name, value in fields:
        value = tuple(value) if isinstance(value, list) else value
        if f"{section}.{name}" not in given and config[section][name] != value:
            config[section][name] = value
    return True
