"""Latent model for celeba_64: the published values for latents of length 256. Not reproduced here yet."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.name = "celeba_64"
    config.run.experiment = "celeba_64_sampler"
    config.model.z_dim = 256
    return config
