"""Ablations as data: fields that exist, names that tell variants apart, networks that can be built."""


import pytest
import torch

from configs.ablations import AXES, get_variants
from configs.defaults import autoencoder_config
from experiments.lib.ablation_runs import make_variant
from models.build import build_decoder, build_encoder
from tests.tiny import tiny_config

PUBLISHED = {"subsampling": ["1/1", "1/2", "1/4", "1/8"], "sampling_kind": ["uniform", "halton", "stratified"],
             "kernel": ["depthwise", "full"], "operator": ["paper", "consistent"],
             "mollifier": ["sigma 0", "sigma 0.5", "sigma 1", "sigma 2"],
             "parameterisation": ["mollified_epsilon", "epsilon", "v", "xstart"], "neighbours": ["k 1", "k 3", "k 8"],
             "grid": ["conv", "spectral"], "encoder": ["encoder", "none"]}


def test_the_axes():
    base = autoencoder_config(128)
    assert set(AXES) == {*PUBLISHED, "seed"}
    for axis, names in PUBLISHED.items():
        assert list(get_variants(axis, base)) == names


@pytest.mark.parametrize("axis", AXES)
def test_exactly_one_variant_of_an_axis_is_the_published_config(axis):
    """So that every axis is compared with the same base."""
    variants = get_variants(axis, autoencoder_config(128))
    assert [changes == {} for changes in variants.values()].count(True) == 1
    assert len({repr(changes) for changes in variants.values()}) == len(variants)
    assert len(AXES[axis].__doc__) > 60


@pytest.mark.parametrize("axis", AXES)
def test_every_variant_can_be_built_and_run(axis, tmp_path):
    base = tiny_config(tmp_path)
    for name, changes in get_variants(axis, base).items():
        config = make_variant(axis, name, changes).config(base, tmp_path)
        for field, value in changes.items():
            section, key = field.split(".")
            assert config[section][key] == value
        assert build_decoder(config) is not None and build_encoder(config) is not None
    assert base.to_dict() == tiny_config(tmp_path).to_dict()


def test_subsampling_follows_the_image_size():
    base = autoencoder_config(128)
    base.data.img_size = 32
    assert get_variants("subsampling", base) == {
        "1/1": {"mc_integral.q_sample": 1024}, "1/2": {"mc_integral.q_sample": 512}, "1/4": {},
        "1/8": {"mc_integral.q_sample": 128}}


def test_without_an_encoder_the_decoder_needs_no_latent(tmp_path):
    from data.coordinates import Coordinates

    config = make_variant("encoder", "none", {"model.z_dim": 0}).config(tiny_config(tmp_path), tmp_path)
    encoder, decoder = build_encoder(config), build_decoder(config)
    coords = Coordinates.random(2, (16, 16), 64)
    values = torch.randn(2, 64, 3)
    z = encoder(values, coords)
    assert z.shape == (2, 0) and not list(encoder.parameters())
    out = decoder(values, torch.tensor([0.0, 500.0]), z, coords)
    out.square().sum().backward()
    assert out.shape == values.shape and not any("latent" in name for name, _ in decoder.named_parameters())
