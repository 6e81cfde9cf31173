"""The latent model over random_fields: half a minute on one CPU thread, after the encoding."""

from configs.demo_latent_config import get_config as demo_latent_config


def get_config():
    config = demo_latent_config()
    config.run.name = "random_fields"
    config.run.experiment = "random_fields_sampler"
    config.model.z_dim = 64
    return config
