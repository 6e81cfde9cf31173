"""The latent model of ffhq_256_flow, itself a few-step model, with the network of ffhq_latent. Not trained yet.

Target for both stages together, by one evaluation each: FID_CLIP 11.37 (see ffhq_256_flow).
"""

from configs.ffhq_latent_config import get_config as ffhq_latent_config


def get_config():
    config = ffhq_latent_config()
    config.run.experiment = "ffhq_256_flow_sampler"
    config.diffusion.objective = "few_step"
    config.diffusion.loss_type = "mse"
    return config
