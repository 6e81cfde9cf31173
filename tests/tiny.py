"""Configs small enough to train in a test."""

from configs.defaults import autoencoder_config, latent_config


def tiny_config(output_dir, data_dir="", name="photos", img_size=16):
    """A stage-1 config of a few thousand parameters, in float32 on the CPU."""
    config = autoencoder_config(img_size)
    config.run.experiment = "tiny"
    config.run.output_dir = str(output_dir)
    config.run.device = "cpu"
    config.data.name, config.data.root_dir, config.data.num_workers = name, str(data_dir), 0
    config.train.precision = "fp32"
    config.train.batch_size, config.train.sample_size, config.train.max_steps = 4, 2, 4
    config.train.plot_graph_steps, config.train.ema_update_every, config.train.ema_decay = 2, 1, 0.9
    config.model.nf, config.model.time_emb_dim, config.model.num_conv_blocks, config.model.z_dim = 8, 8, 1, 6
    config.model.kernel_size = 3
    config.model.backend = "torch_dense"
    config.model.uno_res, config.model.uno_base_channels, config.model.uno_mults = 8, 8, (1, 2)
    config.model.uno_blocks_per_level, config.model.uno_attn_resolutions = (1, 1), (4,)
    config.model.uno_dropout_from_resolution, config.model.uno_dropout = 8, 0.2
    config.diffusion.steps = 20
    return config


def tiny_latent_config(output_dir):
    """A stage-2 config over the latents of `tiny_config`."""
    config = latent_config()
    config.run.experiment = "tiny_sampler"
    config.run.output_dir = str(output_dir)
    config.run.device = "cpu"
    config.data.fid_samples = 3
    config.train.precision = "fp32"
    config.train.batch_size, config.train.sample_size, config.train.max_steps = 8, 2, 4
    config.train.plot_graph_steps, config.train.ema_update_every, config.train.ema_decay = 2, 1, 0.9
    config.model.z_dim, config.model.num_layers, config.model.hid_channels, config.model.time_embed_dim = 6, 2, 16, 8
    config.model.dropout = 0.1
    config.diffusion.steps = 20
    return config


def write_config_file(config, path):
    """Write a file for --config with the fields of `config`, references to img_size as numbers; returns its path."""
    path.write_text("from ml_collections import ConfigDict\n\n\n"
                    f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n")
    return str(path)
