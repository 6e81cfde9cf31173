"""The demo with one channel: the same windows in grey.

Its latent model is configs/demo_latent_config.py with --config.run.experiment=demo_grey_sampler.
"""

from configs.demo_config import get_config as demo_config


def get_config():
    config = demo_config()
    config.run.experiment = "demo_grey"
    config.data.channels = 1
    return config
