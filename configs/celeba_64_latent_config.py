"""Latent model for celeba_64: the published latent values over its z_dim of 256; the result is only expected."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.name = "celeba_64"
    config.run.experiment = "celeba_64_sampler"
    config.model.z_dim = 256
    return config
