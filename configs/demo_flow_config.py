"""The demo's autoencoder as a few-step model: its network, data and training time, for samples by 1 to 4 evaluations.

A step evaluates the network once more than the demo's, without gradients, so there are fewer steps.
"""

from configs.demo_config import get_config as demo_config


def get_config():
    config = demo_config()
    config.run.experiment = "demo_flow"
    config.train.max_steps = 2200
    config.diffusion.objective = "few_step"
    return config
