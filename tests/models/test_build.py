import pytest
import torch
import torch._functorch.config as functorch

from data.coordinates import Coordinates
from models.build import build_decoder, build_encoder, build_latent_model
from models.sparse_conv import BACKENDS, available_backends
from tests.models.tiny import draw, tiny_config, tiny_decoder, tiny_encoder, tiny_latent_config
from utils.errors import UserError


def parameters(build, config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())


def test_published_models_have_the_published_number_of_parameters():
    config = tiny_config(
        nf=64, time_emb_dim=256, num_conv_blocks=3, kernel_size=7, uno_res=128, uno_base_channels=128,
        uno_mults=(1, 2, 4, 8, 8), uno_blocks_per_level=(2, 2, 2, 2, 2), uno_attn_resolutions=(16, 8), z_dim=1024,
    )
    assert parameters(build_decoder, config) == pytest.approx(321.5e6, rel=1e-3)
    assert parameters(build_encoder, config) == pytest.approx(122.0e6, rel=1e-2)
    for num_layers, published in [(10, 75.7e6), (20, 159.7e6)]:
        latent = tiny_latent_config(z_dim=1024, num_layers=num_layers, hid_channels=2048, time_embed_dim=128)
        assert parameters(build_latent_model, latent) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(("field", "value", "hint"), [
    ("kernel_size", 4, "odd"),
    ("uno_res", 9, "multiple of 2"),
    ("uno_blocks_per_level", (1,), "2 levels"),
    ("uno_blocks_per_level", (1, 0), "positive"),
    ("uno_mults", (), "positive"),
    ("uno_attn_resolutions", (4, 3), "8, 4"),
    ("uno_conv_type", "fourier", "conv or spectral"),
    ("attention", "linear", "sdpa"),
    ("backend", "cudnn", "torch_dense"),
])
def test_impossible_architectures_are_named(field, value, hint):
    for build in (build_decoder, build_encoder):
        with pytest.raises(UserError, match=f"model.{field}=.*{hint}") as caught:
            build(tiny_config(**{field: value}))
        assert str(value) in str(caught.value) and "\n" not in str(caught.value)


def test_odd_embeddings_and_too_few_layers_are_named():
    with pytest.raises(UserError, match="model.time_emb_dim=7 must be even"):
        build_decoder(tiny_config(time_emb_dim=7))
    with pytest.raises(UserError, match="model.time_embed_dim=7 must be even"):
        build_latent_model(tiny_latent_config(time_embed_dim=7))
    with pytest.raises(UserError, match="model.num_layers=1 must be at least 2"):
        build_latent_model(tiny_latent_config(num_layers=1))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in available_backends()])
def test_missing_backends_are_named(backend):
    with pytest.raises(UserError, match=f"model.backend='{backend}'.*torch_dense"):
        build_decoder(tiny_config(backend=backend, depthwise_sparse=BACKENDS[backend].depthwise))


@pytest.mark.parametrize(("backend", "kind"), [
    (name, kind) for name in available_backends() for kind in ("depthwise", "full") if getattr(BACKENDS[name], kind)
])
def test_a_checkpoint_gives_the_same_on_every_backend(backend, kind):
    device = next(device for device in ("cpu", "cuda") if device in BACKENDS[backend].devices)
    dense = tiny_decoder(backend="torch_dense", depthwise_sparse=kind == "depthwise").to(device)
    other = build_decoder(tiny_config(backend=backend, depthwise_sparse=kind == "depthwise")).eval().to(device)
    other.load_state_dict(dense.state_dict())
    values, t, z, coords = draw(size=(8, 12))
    coords = Coordinates(coords.index.to(device), coords.size)
    with torch.backends.cudnn.flags(allow_tf32=False):
        out, expected = (model(values.to(device), t.to(device), z.to(device), coords) for model in (other, dense))
    assert expected.std() > 0.01
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("field", "value"), [
    ("nf", 12), ("time_emb_dim", 12), ("num_conv_blocks", 1), ("knn_neighbours", 1), ("depthwise_sparse", False),
    ("kernel_size", 5), ("uno_res", 4), ("uno_base_channels", 12), ("uno_mults", (1, 1)),
    ("uno_blocks_per_level", (1, 1)), ("uno_attn_resolutions", ()), ("uno_conv_type", "spectral"),
    ("learn_sigma", True),
])
def test_every_field_of_the_model_section_acts(field, value):
    values, t, z, coords = draw()
    plain, changed = (tiny_decoder(**options)(values, t, z, coords) for options in ({}, {field: value}))
    assert changed.shape == (2, 64, 6 if field == "learn_sigma" else 3)
    assert plain.shape != changed.shape or not torch.allclose(plain, changed, atol=1e-5)
    if field not in ("time_emb_dim", "learn_sigma"):
        plain, changed = (tiny_encoder(**options)(values, coords) for options in ({}, {field: value}))
        assert not torch.allclose(plain, changed, atol=1e-5)


def test_dropout_and_its_resolution_act():
    values, t, z, coords = draw()

    def in_training(**options):
        torch.manual_seed(1)
        return tiny_decoder(**options).train()(values, t, z, coords)

    plain = in_training(uno_dropout=0.0)
    assert not torch.equal(plain, in_training(uno_dropout=0.5))
    assert torch.equal(plain, in_training(uno_dropout=0.5, uno_dropout_from_resolution=2))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_length_of_z_follow_the_config(channels):
    config = tiny_config(z_dim=10)
    config.data.channels = channels
    values, t, z, coords = draw(channels=channels, z_dim=10)
    assert build_decoder(config)(values, t, z, coords).shape == values.shape
    assert build_encoder(config)(values, coords).shape == (2, 10)


def test_the_decoder_starts_at_zero():
    values, t, z, coords = draw()
    assert not build_decoder(tiny_config())(values, t, z, coords).any()


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_networks_to_be_compiled_keep_the_names_of_their_parameters(checkpoint_activations, monkeypatch):
    """Where activations are computed again too, dropout stays with the generator that each step seeds."""
    flag = "graphsafe_rng_functionalization"  # which older versions of PyTorch do not have
    if hasattr(functorch, flag):
        monkeypatch.setattr(functorch, flag, True)
    config, latent = tiny_config(), tiny_latent_config()
    config.train.checkpoint_activations = checkpoint_activations
    made = [(build_decoder, config, "grid_unet"), (build_encoder, config, "grid_down"),
            (build_latent_model, latent, "")]
    names = [list(build(one).state_dict()) for build, one, _ in made]
    config.train.compile = latent.train.compile = True
    for (build, one, part), before in zip(made, names, strict=True):
        network = build(one)
        assert network.get_submodule(part)._compiled_call_impl is not None
        assert list(network.state_dict()) == before
    assert getattr(functorch, flag, not checkpoint_activations) != checkpoint_activations
