"""Latent model for churches_256: 20 layers, 159.7 M parameters, published values. One GPU."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.name = "churches_256"
    config.run.experiment = "churches_256_sampler"
    config.model.z_dim = 1024
    config.model.num_layers = 20
    return config
