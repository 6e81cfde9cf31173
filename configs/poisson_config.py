"""A Gaussian random field a and the solution u of −Δu = a, two channels at 32²: six minutes on one CPU thread.

The network of random_fields without an encoder, as a prior for inverse problems: u is measured, a is recovered.
docs/inverse_problems.md has the commands and the errors.
"""

from configs.random_fields_config import get_config as random_fields_config


def get_config():
    config = random_fields_config()
    config.run.experiment = "poisson"
    config.data.function = "data.random_fields:poisson_pair"
    config.data.channels = 2
    config.model.z_dim = 0
    return config
