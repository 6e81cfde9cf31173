"""The 64² model of BENCHMARKS.md: small enough to time on a CPU, not meant for training."""

from configs.defaults import autoencoder_config


def get_config():
    config = autoencoder_config(img_size=64)
    config.run.experiment = "benchmark_64"
    config.train.batch_size = 8
    config.train.sample_size = 8
    config.model.nf = 32
    config.model.uno_res = 32
    config.model.uno_base_channels = 32
    config.model.uno_mults = (1, 2, 4)
    config.model.uno_blocks_per_level = (2, 2, 2)
    config.model.uno_attn_resolutions = (8,)
    config.model.z_dim = 128
    return config
