"""Builds the networks from a config; nothing else does."""

from functools import partial

from torch import nn

from models.autoencoder import NoEncoder, PointsToGrid, SparseEncoder, SparseUNet
from models.blocks import SparseBlock
from models.grid_unet import GridDown, GridSpec, GridUNet, Stage, check_attention
from models.latent_mlp import MLPSkipNet
from models.sparse_conv import resolve_backend
from utils.errors import UserError


def build_decoder(config, conditions=None):
    """SparseUNet of a stage-1 config, in float32 on the CPU. Raises UserError if fields of config.model contradict.

    conditions  data.conditions.Conditions of the training images, which model.condition=latent keeps from the decoder
    """
    model, channels = config.model, config.data.channels
    _check_even(model, "time_emb_dim")
    decoder = SparseUNet(
        channels=channels,
        out_channels=2 * channels if model.learn_sigma else channels,
        width=model.nf,
        num_blocks=model.num_conv_blocks,
        make_block=partial(_sparse_block, config),
        grid_unet=GridUNet(_grid_spec(model)),
        neighbours=model.knn_neighbours,
        time_emb_dim=model.time_emb_dim,
        z_dim=model.z_dim,
        backend=model.backend,
        jumps=config.diffusion.objective == "few_step",
        conditions=None if model.condition == "latent" else conditions,
    )
    preserve_variance(decoder)
    return _prepared(config, decoder)


def build_encoder(config):
    """SparseEncoder of a stage-1 config (NoEncoder if z_dim is 0), in float32 on the CPU. Raises UserError if fields of
    config.model contradict."""
    model = config.model
    spec = _grid_spec(model)
    if model.z_dim == 0:
        return NoEncoder()
    blocks = [_sparse_block(config) for _ in range(model.num_conv_blocks)]
    encoder = SparseEncoder(
        PointsToGrid(config.data.channels, model.nf, blocks, spec, model.knn_neighbours, model.backend),
        GridDown(spec),
        model.z_dim,
        model.stochastic_encoding,
    )
    preserve_variance(encoder)
    return _prepared(config, encoder)


def build_latent_model(config, conditions=None):
    """MLPSkipNet of a stage-2 config, in float32 on the CPU. Raises UserError if fields of config.model contradict.

    conditions  data.conditions.Conditions that it follows, or None
    """
    model = config.model
    _check(model.z_dim >= 1, model, "z_dim", "must be at least 1; an autoencoder without an encoder has no latents")
    _check_even(model, "time_embed_dim")
    return MLPSkipNet(model.z_dim, model.hid_channels, model.num_layers, model.time_embed_dim, model.dropout,
                      jumps=config.diffusion.objective == "few_step", conditions=conditions)


def preserve_variance(network):
    """Initialise all Linear and convolution layers: normal weights of variance 1 / fan-in, zero biases.

    PyTorch's default shrinks a signal by sqrt(3) in every layer without normalisation. The encoder has about ten of
    them, so that z would hardly depend on the image at first. Layers that are zero, the last ones of the residual
    branches, stay zero. Other parameters keep their values (docs/method.md, 4.9).
    """
    for layer in network.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) or layer.weight.is_meta:
            continue
        if layer.weight.any():
            nn.init.normal_(layer.weight, std=_fan_in(layer) ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _fan_in(layer):
    """Number of products in the sum of one output."""
    if isinstance(layer, nn.ConvTranspose2d):  # an output sees one of stride² phases of the kernel
        return layer.weight[:, 0].numel() / (layer.stride[0] * layer.stride[1])
    return layer.weight[0].numel()


def _prepared(config, network):
    """The network, with the activation checkpointing of config.train."""
    for module in network.modules():
        if isinstance(module, (SparseBlock, Stage)):  # they hold nearly all of the memory
            module.checkpoint_activations = config.train.checkpoint_activations
    return network


def _sparse_block(config):
    model = config.model
    resolve_backend(model.backend, device=None, depthwise=model.depthwise_sparse)
    return SparseBlock(model.nf, model.kernel_size, config.data.img_size, model.depthwise_sparse, model.backend,
                       consistent=model.operator == "consistent")


def _grid_spec(model):
    spec = GridSpec(
        resolution=model.uno_res,
        base_channels=model.uno_base_channels,
        mults=tuple(model.uno_mults),
        blocks_per_level=tuple(model.uno_blocks_per_level),
        attn_resolutions=tuple(model.uno_attn_resolutions),
        dropout_from_resolution=model.uno_dropout_from_resolution,
        dropout=model.uno_dropout,
        conv_type=model.uno_conv_type,
        attention=model.attention,
    )
    levels, occurring = len(spec.mults), ", ".join(map(str, spec.resolutions))
    _check(levels >= 1 and min(spec.mults) >= 1, model, "uno_mults", "must be positive, one for each level")
    _check(len(spec.blocks_per_level) == levels and min(spec.blocks_per_level) >= 1, model, "uno_blocks_per_level",
           f"must be positive, one for each of the {levels} levels of model.uno_mults")
    _check(spec.resolution % 2 ** (levels - 1) == 0, model, "uno_res",
           f"must be a multiple of {2 ** (levels - 1)}, to be halved between the {levels} levels of model.uno_mults")
    _check(set(spec.attn_resolutions) <= set(spec.resolutions), model, "uno_attn_resolutions",
           f"must be among the resolutions of the levels, {occurring}")
    _check(spec.conv_type in ("conv", "spectral"), model, "uno_conv_type", "must be conv or spectral")
    check_attention(spec.attention)
    return spec


def _check_even(model, field):
    _check(getattr(model, field) % 2 == 0, model, field, "must be even: half sines, half cosines")


def _check(holds, model, field, allowed):
    if not holds:
        raise UserError(f"model.{field}={getattr(model, field)!r} {allowed}")
