"""Latent model for ffhq_128: the published values for latents of length 256."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.name = "ffhq_128"
    config.run.experiment = "ffhq_128_sampler"
    config.model.z_dim = 256
    return config
