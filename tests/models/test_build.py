"""Networks from configs: their parameters, the fields that shape them, and that their layers are what runs."""

import functools
import importlib

import pytest
import torch
from torch import nn

import models.blocks
import models.build
import models.grid_unet
from data.coordinates import Coordinates
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.sampling import decode
from models.build import build_decoder, build_encoder, build_latent_model
from models.kernels import BACKENDS, Backend
from models.sparse_conv import available_backends
from tests.models.tiny import SIZE, awake, draw, tiny_config, tiny_decoder, tiny_encoder, tiny_latent_config
from utils.device import autocast, in_training
from utils.errors import UserError
from utils.rng import sample_generators


@pytest.mark.parametrize(("config", "build", "count"), [
    ("ffhq_256", build_decoder, 321_513_283), ("ffhq_128", build_decoder, 43_591_747),
    ("ffhq_256", build_encoder, 121_180_032), ("ffhq_128", build_encoder, 16_256_832),
    ("ffhq_latent", build_latent_model, 75_705_344), ("churches_latent", build_latent_model, 159_673_344),
])
def test_published_configs_have_the_published_number_of_parameters(config, build, count):
    config = importlib.import_module(f"configs.{config}_config").get_config()
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build(config).parameters()) == count


@pytest.mark.parametrize(("field", "value", "hint"), [
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


@pytest.mark.parametrize(("build", "config", "message"), [
    (build_decoder, tiny_config(time_emb_dim=7), "model.time_emb_dim=7 must be even"),
    (build_latent_model, tiny_latent_config(time_embed_dim=7), "model.time_embed_dim=7 must be even"),
    (build_latent_model, tiny_latent_config(z_dim=0), "model.z_dim=0 must be at least 1"),
])
def test_odd_embeddings_and_latents_without_an_encoder_are_named(build, config, message):
    with pytest.raises(UserError, match=message):
        build(config)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in available_backends()])
def test_missing_backends_are_named(backend):
    with pytest.raises(UserError, match=f"model.backend='{backend}'.*torch_dense"):
        build_decoder(tiny_config(backend=backend, depthwise_sparse=BACKENDS[backend].depthwise))


@pytest.mark.parametrize(("field", "value"), [
    ("nf", 12), ("time_emb_dim", 12), ("num_conv_blocks", 1), ("knn_neighbours", 1), ("depthwise_sparse", False),
    ("kernel_size", 5), ("operator", "consistent"), ("uno_res", 4), ("uno_base_channels", 12), ("uno_mults", (1, 1)),
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
def test_channels_and_length_of_z_follow_the_config_and_the_decoder_starts_at_zero(channels):
    config = tiny_config(z_dim=10)
    config.data.channels = channels
    values, t, z, coords = draw(channels=channels, z_dim=10)
    out = build_decoder(config)(values, t, z, coords)
    assert out.shape == values.shape and not out.any()
    assert build_encoder(config)(values, coords).shape == (2, 10)


def test_without_an_encoder_latents_are_empty():
    config = tiny_config(z_dim=0)
    values, t, _, coords = draw()
    z = build_encoder(config)(values, coords)
    assert z.shape == (2, 0) and awake(build_decoder(config))(values, t, z, coords).any()


def training_step(config, decoder, encoder):
    """(loss, gradients) of one step of stage 1, with the parameters of both networks in order."""
    diffusion, generators = build_diffusion(config), sample_generators("cpu", [0, 1], "coordinates")
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    seen, coords = (Coordinates.random(2, (SIZE, SIZE), 64, generator=generators) for _ in range(2))
    z = encoder(seen.gather(images), seen)
    noise = diffusion.mollifier.noise_like(images, generators)
    terms = diffusion.training_losses(lambda values, t: decoder(values, t, z, coords), images,
                                      torch.tensor([100, 700]), coords, noise)
    loss = terms["loss"].mean()
    return loss, *torch.autograd.grad(loss, [*decoder.parameters(), *encoder.parameters()])


def test_every_layer_that_somebody_replaces_is_called_in_training_in_sampling_and_above_max_points(monkeypatch):
    called = set()

    def recording(cls):
        class Recording(cls):
            def forward(self, *inputs, **options):
                called.add(self)
                return super().forward(*inputs, **options)

        return Recording

    film, block, norm = (recording(cls) for cls in (models.blocks.FiLM, models.blocks.SparseBlock, nn.LayerNorm))
    for module, name, cls in [(models.blocks, "FiLM", film), (models.grid_unet, "FiLM", film),
                              (models.build, "SparseBlock", block), (nn, "LayerNorm", norm)]:
        monkeypatch.setattr(module, name, cls)
    config = tiny_config()
    decoder, encoder = awake(build_decoder(config)), awake(build_encoder(config))
    layers = {network: {layer for layer in network.modules() if isinstance(layer, (film, block, norm))}
              for network in (decoder, encoder)}
    assert all({type(layer) for layer in layers[network]} == {film, block, norm} for network in (decoder, encoder))

    training_step(config, decoder.train(), encoder.train())
    assert called == layers[decoder] | layers[encoder]
    called.clear()
    decode(decoder.eval(), build_diffusion(config, 2), torch.zeros(1, 6), (SIZE, SIZE))
    assert called == layers[decoder]
    called.clear()
    values, t, z, coords = draw(1, (32, 32), share=1)
    full = Coordinates.full(1, (32, 32))
    with torch.no_grad():
        decoder(values, t, z, full, max_points=300)
        encoder(values, full, max_points=300)
    assert called == layers[decoder] | layers[encoder]


def without_kernels():
    def fail(*_):
        raise AssertionError("a kernel was called")

    return {name: Backend(backend.devices, backend.unavailable_reason, fail, backend.depthwise, fail)
            for name, backend in BACKENDS.items()}


@pytest.mark.parametrize("depthwise", [True, False])
def test_torch_dense_is_plain_pytorch_and_gives_the_same_training_step(monkeypatch, depthwise):
    found = []
    for backend in ("auto", "torch_dense"):
        config = tiny_config(backend=backend, depthwise_sparse=depthwise)
        torch.manual_seed(0)
        networks = awake(build_decoder(config)), awake(build_encoder(config))
        if found:
            for name, broken in without_kernels().items():
                monkeypatch.setitem(BACKENDS, name, broken)
            if "numba" in available_backends():
                with pytest.raises(AssertionError, match="a kernel was called"):
                    training_step(config, tiny_decoder(), tiny_encoder())
        found.append(training_step(config, *networks))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype", "checkpoint_activations", "options"), [
    ("auto", torch.float32, False, {}), ("torch_dense", torch.bfloat16, False, {"z_dim": 0}),
    ("auto", torch.bfloat16, True, {"stochastic_encoding": True})])
def test_training_compiles_one_graph_per_network_for_all_coordinates(
        backend, dtype, checkpoint_activations, options, monkeypatch):
    """Without a graph break and equal to eager mode, on fresh subsets."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = tiny_config(backend=backend, **options)
    config.train.checkpoint_activations = checkpoint_activations
    networks = [awake(build(config)).train() for build in (build_decoder, build_encoder)]
    compiled = [in_training(network, dtype, compiled=True) for network in networks]
    parameters = [parameter for network in networks for parameter in network.parameters()]
    for seed in range(3):
        found = []
        for decoder, encoder in (networks, compiled):
            values, t, _, coords = draw(seed=seed)  # nothing is cached on them
            with autocast(torch.device("cpu"), dtype):
                z = encoder(values, coords, torch.ones(2, 6))
                out = decoder(values, t, z[0] if isinstance(z, tuple) else z, coords)
            found.append([out, *torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)])
        for ours, theirs in zip(*found, strict=True):
            if theirs is None:
                assert ours is None
                continue
            atol = (1e-5 if dtype == torch.float32 else 0.02) * max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=atol)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
