"""∞-Diff on CelebA-HQ at 256²: the model of ffhq_256. No score is published for this size.

Expected hardware: one A100 80GB, as for FFHQ.
"""

from configs import ffhq_256_config


def get_config():
    config = ffhq_256_config.get_config()
    config.run.name = "celeba_256"
    config.run.experiment = "celeba_256"
    config.data.name = "celeba"
    config.data.root_dir = "datasets/celeba_hq"
    return config
