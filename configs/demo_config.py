"""A small autoencoder for `make demo`: 32² windows of stained tissue, seven minutes on two CPU cores.

The paper's sparse layers around a grid U-Net of 1.2 M parameters, with options that help in a short run: stratified
subsets, prediction of x_0, and a high learning rate that decays to zero. In float32; bf16 takes a tenth less time.
"""

from configs.defaults import autoencoder_config


def get_config():
    config = autoencoder_config(img_size=32)
    config.run.name = "demo"
    config.run.experiment = "demo"
    config.data.name = "tissue"
    config.data.num_workers = 0
    config.train.precision = "fp32"
    config.train.batch_size = 16
    config.train.sample_size = 64
    config.train.max_steps = 2900
    config.train.plot_graph_steps = 50
    config.train.plot_samples_steps = 100_000
    config.train.validate_steps = 500
    config.train.checkpoint_steps = 500
    config.train.ema_update_every = 1
    config.train.ema_decay = 0.99
    config.model.time_emb_dim = 128
    config.model.uno_res = 16
    config.model.uno_base_channels = 32
    config.model.uno_mults = (1, 2, 2)
    config.model.uno_blocks_per_level = (1, 1, 1)
    config.model.uno_attn_resolutions = (8,)
    config.model.uno_dropout = 0.0
    config.model.operator = "consistent"  # all pixels mean what subsets do (docs/ablations.md)
    config.model.z_dim = 128
    config.diffusion.noise_schedule = "linear"  # with cosine, few steps have enough noise to need z
    config.diffusion.model_mean_type = "xstart"  # weights high noise most, where z is learnt
    config.mc_integral.type = "stratified"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.decay = "cosine"
    return config
