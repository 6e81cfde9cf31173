"""Latent model for celeba_128: the published latent values over its z_dim of 256; the result is only expected."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.name = "celeba_128"
    config.run.experiment = "celeba_128_sampler"
    config.model.z_dim = 256
    return config
