"""∞-Diff on LSUN churches (outdoor) at 256², centre crops: the model of ffhq_256.

Published: FID_CLIP 10.36 (50k samples, DDIM 100 steps). Hardware of the authors: one A100 80GB.
Published hyperparameters; not reproduced here yet.
"""

from configs import ffhq_256_config


def get_config():
    config = ffhq_256_config.get_config()
    config.run.name = "churches_256"
    config.run.experiment = "churches_256"
    config.data.name = "churches"
    config.data.root_dir = "datasets/lsun"
    return config
