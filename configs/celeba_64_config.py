"""∞-Diff on CelebA-HQ at 64². Published: FID_CLIP 4.57 (50k samples, DDIM 100 steps).

Hyperparameters of ffhq_128 with half the grid resolution and one level less, since the release has no config for this
size. Not reproduced here yet.
"""

from configs import celeba_128_config


def get_config():
    config = celeba_128_config.get_config()
    config.run.name = "celeba_64"
    config.run.experiment = "celeba_64"
    config.data.img_size = 64
    config.model.uno_res = 32
    config.model.uno_mults = (1, 2, 4)
    config.model.uno_blocks_per_level = (2, 2, 2)
    return config
