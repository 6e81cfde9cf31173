"""∞-Diff on CelebA-HQ at 64². Published: FID_CLIP 4.57 (50k samples, DDIM 100 steps).

The paper gives no hyperparameters for this size; these are ffhq_128 with a grid of half the side, and so one level
less. The result is only expected.
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
