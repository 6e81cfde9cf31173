"""The latent model of `make demo`: about a minute on two CPU cores."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.name = "demo"
    config.run.experiment = "demo_sampler"
    config.data.fid_samples = 256
    config.train.batch_size = 256
    config.train.sample_size = 64
    config.train.max_steps = 2000
    config.train.precision = "fp32"
    config.train.ema_update_every = 1
    config.train.plot_graph_steps = 50
    config.train.plot_samples_steps = 100_000
    config.train.validate_steps = 100
    config.train.checkpoint_steps = 500
    config.model.z_dim = 128
    config.model.num_layers = 4
    config.model.hid_channels = 512
    config.optimizer.learning_rate = 1e-3
    config.optimizer.decay = "cosine"
    return config
