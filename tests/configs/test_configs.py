"""Configs: published values, references that follow, every field read somewhere."""

import importlib
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs.defaults import autoencoder_config, latent_config

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*_config.py"))
STAGE_1 = [name for name in FILES if "latent" not in name]
STAGE_2 = [name for name in FILES if "latent" in name]


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


def leaves(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# field -> (the three models of 256², ffhq_128), from the paper's table of hyperparameters
PUBLISHED = {
    "model.nf": (64, 64), "model.time_emb_dim": (256, 256), "model.num_conv_blocks": (3, 3),
    "model.kernel_size": (7, 7), "model.knn_neighbours": (3, 3), "model.uno_res": (128, 64),
    "model.uno_base_channels": (128, 64), "model.uno_mults": ((1, 2, 4, 8, 8), (1, 2, 4, 8)),
    "model.uno_blocks_per_level": ((2,) * 5, (2,) * 4), "model.uno_attn_resolutions": ((16, 8), (16, 8)),
    "model.uno_dropout_from_resolution": (16, 16), "model.uno_dropout": (0.1, 0.1), "model.z_dim": (1024, 256),
    "train.batch_size": (32, 16), "optimizer.learning_rate": (5e-5, 1e-4), "optimizer.adam_beta1": (0.9, 0.9),
    "optimizer.adam_beta2": (0.99, 0.99), "optimizer.clip_gradient_norm": (1.0, 1.0),
    "mc_integral.q_sample": (128 * 128, 64 * 64), "diffusion.gaussian_filter_std": (1.0, 1.0),
    "diffusion.model_mean_type": ("mollified_epsilon",) * 2, "diffusion.noise_schedule": ("cosine",) * 2,
    "diffusion.multiscale_max_img_size": (128, 64),
    "diffusion.steps": (1000, 1000), "diffusion.precondition": (False, False), "train.ema_decay": (0.995, 0.995),
    "train.ema_update_every": (10, 10), "train.amp": (True, True),
}


@pytest.mark.parametrize("name", ["ffhq_256_config", "celeba_256_config", "churches_256_config", "ffhq_128_config"])
def test_published_hyperparameters(name):
    values = dict(leaves(load(name)))
    for field, (of_256, of_128) in PUBLISHED.items():
        assert values[field] == (of_128 if "128" in name else of_256), field


@pytest.mark.parametrize("name", ["ffhq_latent_config", "celeba_latent_config", "churches_latent_config"])
def test_published_latent_hyperparameters(name):
    values = dict(leaves(load(name)))
    expected = {"model.num_layers": 20 if "churches" in name else 10, "model.hid_channels": 2048, "model.z_dim": 1024,
                "model.time_embed_dim": 128, "diffusion.noise_schedule": "const0.008", "diffusion.loss_type": "l1",
                "diffusion.steps": 1000, "diffusion.model_mean_type": "epsilon", "train.batch_size": 256,
                "optimizer.learning_rate": 1e-4, "optimizer.weight_decay": 0.04, "optimizer.adam_beta2": 0.99}
    assert {field: values[field] for field in expected} == expected


def test_each_size_has_an_autoencoder_and_a_latent_config_that_agree():
    pairs = {"ffhq_256": "ffhq_latent", "ffhq_128": "ffhq_128_latent", "celeba_256": "celeba_latent",
             "celeba_128": "celeba_128_latent", "celeba_64": "celeba_64_latent", "churches_256": "churches_latent",
             "demo": "demo_latent", "demo_grey": "demo_latent", "random_fields": "random_fields_latent",
             "demo_flow": "demo_flow_latent", "ffhq_256_flow": "ffhq_flow_latent"}
    assert set(STAGE_1) == {f"{name}_config" for name in (*pairs, "random_fields_flow", "poisson")}  # without encoder
    assert set(STAGE_2) == {f"{name}_config" for name in pairs.values()}
    for first, second in pairs.items():
        assert load(f"{first}_config").diffusion.objective == load(f"{second}_config").diffusion.objective
        assert load(f"{first}_config").model.z_dim == load(f"{second}_config").model.z_dim


@pytest.mark.parametrize("name", FILES)
def test_fields_are_those_of_the_defaults_and_the_docstring_says_what_to_expect(name):
    defaults = latent_config() if name in STAGE_2 else autoencoder_config(64)
    assert {field for field, _ in leaves(load(name))} == {field for field, _ in leaves(defaults)}
    assert len(importlib.import_module(f"configs.{name}").__doc__) > 60


@pytest.mark.parametrize("name", STAGE_1)
def test_derived_fields_follow_the_image_size(name):
    config = load(name)
    config.data.img_size = 48
    assert config.mc_integral.q_sample == 48 * 48 // 4
    assert config.diffusion.multiscale_max_img_size == 24


def test_every_field_is_read_where_it_acts():
    """Reading a field to check its range is not acting on it, so configs/ and utils/config.py do not count."""
    sources = [path for package in ("utils", "data", "models", "diffusion", "experiments", ".")
               for path in (ROOT / package).glob("*.py" if package == "." else "**/*.py")
               if path != ROOT / "utils" / "config.py"]
    code = "\n".join(path.read_text() for path in sources)
    fields = {field for config in (autoencoder_config(64), latent_config()) for field, _ in leaves(config)}
    aliases = {"diffusion": "diffusion|options", "train": "train|config", "mc_integral": "mc_integral"}
    unread = []
    for field in sorted(fields):
        section, name = field.split(".")
        owner = aliases.get(section, section)
        if not re.search(rf"\b(?:{owner})\.(?:{name}\b|get\(\"{name}\")", code):
            unread.append(field)
    assert not unread
