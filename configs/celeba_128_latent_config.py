"""Latent model for celeba_128: the published values for latents of length 256. Not reproduced here yet."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.name = "celeba_128"
    config.run.experiment = "celeba_128_sampler"
    config.model.z_dim = 256
    return config
