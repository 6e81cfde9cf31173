import pytest
import torch
import torch.nn.functional as F

from models.blocks import TimeEmbedding, sinusoidal_features
from models.build import build_latent_model
from tests.models.tiny import tiny_latent_config


def model(**options):
    torch.manual_seed(0)
    return build_latent_model(tiny_latent_config(**options)).eval()


def draw(batch=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 6, generator=generator), torch.randint(1000, (batch,), generator=generator)


@pytest.mark.parametrize("num_layers", [2, 4])
def test_it_is_its_equations(num_layers):
    net, (z, t) = model(num_layers=num_layers), draw()
    time, h = net.time(t), None
    for layer in net.layers:
        h = layer.linear(z if h is None else torch.cat([h, z], dim=1))
        h = h * (1 + layer.cond(F.gelu(time)))
        h = F.gelu(F.layer_norm(h, (16,)))
    torch.testing.assert_close(net(z, t), net.out(torch.cat([h, z], dim=1)))
    linear = 1 + sum(1 for _ in net.layers)
    assert linear == num_layers


def test_it_depends_on_t_and_not_on_the_rest_of_the_batch():
    net, (z, t) = model(), draw()
    out = net(z, t)
    assert out.shape == z.shape
    torch.testing.assert_close(net(z[1:2], t[1:2]), out[1:2])
    assert not torch.allclose(net(z, (t + 300) % 1000), out, atol=1e-4)


def test_dropout_acts_in_training_alone():
    net, (z, t) = model(dropout=0.5), draw()
    assert torch.equal(net(z, t), net(z, t))
    net.train()
    torch.manual_seed(0)
    assert not torch.equal(net(z, t), net(z, t))
    plain = model(dropout=0.0)
    assert torch.equal(plain.train()(z, t), model()(z, t))


def test_bfloat16_autocast_stays_close_and_has_gradients():
    net, (z, t) = model(), draw()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(z, t)
    out.square().sum().backward()
    assert out.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
    torch.testing.assert_close(out, net(z, t), rtol=0.05, atol=0.05)


def test_the_length_of_a_jump_is_a_second_embedding_that_starts_at_zero():
    torch.manual_seed(0)
    embedding, t = TimeEmbedding(8, 6, jumps=True), torch.tensor([[0.0, 3.0], [500.0, 90.0]])
    first = embedding.mlp(sinusoidal_features(t[:, 0], 8))
    assert torch.equal(embedding(t), first)
    torch.nn.init.normal_(embedding.jump.mlp[-1].weight)
    torch.testing.assert_close(embedding(t), first + embedding.jump.mlp(sinusoidal_features(t[:, 1], 8)))


def test_only_few_step_models_have_the_second_embedding():
    sizes = {}
    for objective in ("ddpm", "flow", "few_step"):
        config = tiny_latent_config()
        config.diffusion.objective = objective
        sizes[objective] = sum(parameter.numel() for parameter in build_latent_model(config).parameters())
    assert sizes["ddpm"] == sizes["flow"] < sizes["few_step"]
