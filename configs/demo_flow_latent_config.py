"""The latent model of demo_flow, itself a few-step model: about a minute on two CPU cores."""

from configs.demo_latent_config import get_config as demo_latent_config


def get_config():
    config = demo_latent_config()
    config.run.experiment = "demo_flow_sampler"
    config.diffusion.objective = "few_step"
    config.diffusion.loss_type = "mse"
    return config
