"""The demo in shades of grey: the same windows of photographs, with one channel.

Its latent model is that of the demo, as another run: configs/demo_latent_config.py with
--config.run.experiment=demo_grey_sampler.
"""

from configs.demo_config import get_config as demo_config


def get_config():
    config = demo_config()
    config.run.experiment = "demo_grey"
    config.data.channels = 1
    return config
