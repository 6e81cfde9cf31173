"""Latent model for celeba_256: the published values of FFHQ. No score is published for this size."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.name = "celeba_256"
    config.run.experiment = "celeba_256_sampler"
    config.model.z_dim = 1024
    return config
