"""The 128² model of BENCHMARKS.md: small enough to time on a CPU, not meant for training."""

from configs.defaults import autoencoder_config


def get_config():
    config = autoencoder_config(img_size=128)
    config.run.experiment = "benchmark_128"
    config.train.batch_size = 4
    config.train.sample_size = 4
    config.model.nf = 64
    config.model.uno_res = 64
    config.model.uno_base_channels = 64
    config.model.uno_mults = (1, 2, 4, 8)
    config.model.uno_blocks_per_level = (2, 2, 2, 2)
    config.model.uno_attn_resolutions = (16, 8)
    config.model.z_dim = 256
    return config
