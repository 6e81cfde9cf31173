"""Models small enough for tests, with no layer left at zero."""

import torch

from configs.defaults import autoencoder_config, latent_config
from data.coordinates import Coordinates
from models.build import build_decoder, build_encoder

SIZE = 16  # training resolution


def tiny_config(**model):
    """Stage-1 config of a model of some ten thousand parameters; keywords override fields of config.model."""
    config = autoencoder_config(SIZE)
    config.model.update(
        nf=8, time_emb_dim=8, num_conv_blocks=2, kernel_size=3, uno_res=8, uno_base_channels=8, uno_mults=(1, 2),
        uno_blocks_per_level=(1, 2), uno_attn_resolutions=(4,), uno_dropout_from_resolution=4, uno_dropout=0.0, z_dim=6,
    )
    config.model.update(model)
    return config


def tiny_latent_config(**model):
    """Stage-2 config of a tiny model; keywords override fields of config.model."""
    config = latent_config()
    config.model.update(z_dim=6, num_layers=4, hid_channels=16, time_embed_dim=8)
    config.model.update(model)
    return config


def awake(model, seed=0):
    """The model with random numbers in every parameter that starts at zero, so that all of it can be seen.

    All weights are then reduced, which makes the function about as smooth as that of a trained model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
            elif parameter.dim() > 1:
                parameter.mul_(3**-0.5)
    return model.eval()


def tiny_decoder(conditions=None, **model):
    torch.manual_seed(0)
    return awake(build_decoder(tiny_config(**model), conditions))


def tiny_encoder(**model):
    torch.manual_seed(0)
    return awake(build_encoder(tiny_config(**model)))


def draw(batch=2, size=(SIZE, SIZE), share=0.25, seed=0, channels=3, z_dim=6):
    """(values, t, z, coords) at a random subset of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    coords = Coordinates.random(batch, size, max(3, int(size[0] * size[1] * share)), generator=generator)
    values = torch.randn(batch, coords.num_points, channels, generator=generator)
    t = torch.randint(1000, (batch,), generator=generator)
    return values, t, torch.randn(batch, z_dim, generator=generator), coords
