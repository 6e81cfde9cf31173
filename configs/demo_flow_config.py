"""The demo's autoencoder as a few-step model: its network, data and training time, for samples by 1 to 4 evaluations.

A step evaluates the network once more than that of the demo, without gradients, and takes 1.34 times as long (CPU time
of one thread, medians of 8 steps in turn), so there are fewer steps.
"""

from configs.demo_config import get_config as demo_config


def get_config():
    config = demo_config()
    config.run.experiment = "demo_flow"
    config.train.max_steps = 2160
    config.diffusion.objective = "few_step"
    return config
