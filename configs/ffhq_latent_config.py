"""Latent model for ffhq_256: 75.7 M parameters, published values. One GPU; images are encoded once."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.name = "ffhq_256"
    config.run.experiment = "ffhq_256_sampler"
    config.model.z_dim = 1024
    return config
