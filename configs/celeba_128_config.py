"""∞-Diff on CelebA-HQ at 128². Published: FID_CLIP 3.02 (50k samples, DDIM 100 steps).

Hyperparameters of ffhq_128, since the release has no config for this size. Not reproduced here yet.
"""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.name = "celeba_128"
    config.run.experiment = "celeba_128"
    config.data.name = "celeba"
    config.data.root_dir = "datasets/celeba_hq"
    return config
