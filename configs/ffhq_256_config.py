"""∞-Diff on FFHQ at 256², the paper's main model: 321.5 M (decoder) + 121.2 M (encoder) parameters.

Published: FID_CLIP 3.87 (50k samples, DDIM 100 steps). Hardware of the authors: one A100 80GB.
Published hyperparameters; not reproduced here yet.
"""

from configs.defaults import autoencoder_config


def get_config():
    config = autoencoder_config(img_size=256)
    config.run.name = "ffhq_256"
    config.run.experiment = "ffhq_256"
    config.data.name = "ffhq"
    config.data.root_dir = "datasets/ffhq"
    config.train.batch_size = 32
    config.model.uno_res = 128
    config.model.uno_base_channels = 128
    config.model.uno_mults = (1, 2, 4, 8, 8)
    config.model.uno_blocks_per_level = (2, 2, 2, 2, 2)
    config.model.z_dim = 1024
    config.optimizer.learning_rate = 5e-5
    return config
