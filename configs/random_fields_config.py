"""Gaussian random fields as functions (data/random_fields.py), at 32²: five minutes on one CPU thread.

The demo's network with one channel. It predicts T xi, since fine details are learnt at low noise, which the demo's
target weights least. docs/functions.md has the commands, and the spectra of samples at 32², 64² and 128².
"""

from configs.demo_config import get_config as demo_config


def get_config():
    config = demo_config()
    config.run.name = "random_fields"
    config.run.experiment = "random_fields"
    config.data.name = "function"
    config.data.function = "data.random_fields:gaussian_field"
    config.data.num_functions = 8000
    config.data.channels = 1
    config.train.max_steps = 1500
    config.train.sample_size = 16
    config.model.operator = "paper"
    config.model.z_dim = 64
    config.diffusion.noise_schedule = "cosine"
    config.diffusion.model_mean_type = "mollified_epsilon"
    config.diffusion.precondition = True
    config.diffusion.balance_loss = True
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    return config
