"""A Gaussian random field a and the solution u of −Δu = 20 a, two channels at 32²: a prior for inverse problems.

The network of random_fields, without an encoder. u is measured and a is recovered (docs/inverse_problems.md). This
config has not been trained to the end. It should take five minutes on one CPU thread, as random_fields does.
"""

from configs.random_fields_config import get_config as random_fields_config


def get_config():
    config = random_fields_config()
    config.run.experiment = "poisson"
    config.data.function = "data.random_fields:poisson_pair"
    config.data.channels = 2
    config.model.z_dim = 0
    return config
