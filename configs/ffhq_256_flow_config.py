"""A few-step model of FFHQ at 256², with the network and the optimiser of ffhq_256.

Not trained yet. Target: the published one-step figure for this data set, FID_CLIP 11.37 (Functional Mean Flow,
arXiv 2511.12898), against 3.87 of ∞-Diff with 100 steps.
"""

from configs.ffhq_256_config import get_config as ffhq_256_config


def get_config():
    config = ffhq_256_config()
    config.run.experiment = "ffhq_256_flow"
    config.diffusion.objective = "few_step"
    return config
