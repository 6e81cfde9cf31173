"""A few-step model of Gaussian random fields, without an encoder: seven minutes on one CPU thread.

The network of random_fields with the jump objective (docs/method.md, 8). The exact map from noise to field is known
for this data, and experiments/flow_error.py compares samples with it.
"""

from configs.random_fields_config import get_config as random_fields_config


def get_config():
    config = random_fields_config()
    config.run.experiment = "random_fields_flow"
    config.model.z_dim = 0
    config.diffusion.objective = "few_step"
    config.model.operator = "consistent"
    config.diffusion.data_std = 0.18
    config.diffusion.precondition = False
    config.diffusion.balance_loss = False
    return config
