"""Latent model for celeba_256: the values published for FFHQ; no figure is published for this size."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.name = "celeba_256"
    config.run.experiment = "celeba_256_sampler"
    config.model.z_dim = 1024
    return config
