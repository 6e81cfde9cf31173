"""Decoder and encoder: against slow references, and their invariances."""

import pytest
import torch
import torch.nn.functional as F

from data.coordinates import Coordinates
from experiments.lib.reference import ReferenceDecoder, ReferenceEncoder
from models.build import build_decoder, build_encoder
from tests.models.tiny import SIZE, awake, draw, tiny_config, tiny_decoder, tiny_encoder

CASES = [((16, 16), 1 / 4), ((16, 16), 1), ((32, 16), 1 / 2), ((17, 13), 1 / 8)]


def outputs_and_gradients(network, out):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return [out, *torch.autograd.grad((out * weight).sum(), list(network.parameters()))]


@pytest.mark.parametrize(("size", "share"), CASES)
@pytest.mark.parametrize("model", [{}, {"depthwise_sparse": False, "knn_neighbours": 2, "operator": "consistent"}])
def test_they_agree_with_the_references_forward_and_backward(size, share, model):
    decoder, encoder = tiny_decoder(**model), tiny_encoder(**model)
    values, t, z, coords = draw(size=size, share=share)
    for network, ours, theirs in [
        (decoder, decoder(values, t, z, coords), ReferenceDecoder(decoder)(values, t, z, coords)),
        (encoder, encoder(values, coords), ReferenceEncoder(encoder)(values, coords)),
    ]:
        for found, expected in zip(*(outputs_and_gradients(network, out) for out in (ours, theirs)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (17, 13)])
def test_order_of_the_points_raster_order_and_the_batch_do_not_matter(size):
    decoder, encoder = tiny_decoder(), tiny_encoder()

    def check(values, coords, other_values, other, back):
        z, t = torch.ones(len(values), 6), torch.full((len(values),), 500)
        out, again = (decoder(v, t[: len(v)], z[: len(v)], c) for v, c in ((values, coords), (other_values, other)))
        torch.testing.assert_close(back(out), again, rtol=1e-4, atol=1e-5)
        latent = encoder(values, coords)[: len(other_values)]
        torch.testing.assert_close(latent, encoder(other_values, other), rtol=1e-4, atol=1e-5)

    values, _, _, coords = draw(size=size)
    order = torch.randperm(coords.num_points)
    check(values, coords, values[:, order], Coordinates(coords.index[:, order], size), lambda out: out[:, order])
    check(values, coords, values[:1], Coordinates(coords.index[:1], size), lambda out: out[:1])
    full, shuffled = Coordinates.full(2, size), draw(size=size, share=1)[3]
    image = torch.randn(2, 3, *size)
    check(full.gather(image), full, shuffled.gather(image), shuffled, lambda out: shuffled.gather(full.scatter(out)))


def smooth(coords):
    """One function on [0, 1]² with three channels, at the coordinates."""
    x, y = coords.positions.unbind(-1)
    return torch.stack([torch.sin(3 * x + 1) * torch.cos(4 * y), x - y, torch.cos(5 * x * y)], dim=-1)


def test_a_smooth_image_gives_the_same_at_every_resolution():
    """Averaged over five random networks, because single ones differ much."""
    t, z = torch.tensor([300]), torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    coarse, fine, latent = [], [], []
    for seed in range(5):
        torch.manual_seed(seed)
        config = tiny_config(kernel_size=5)
        decoder, encoder = awake(build_decoder(config), seed), awake(build_encoder(config), seed)
        outputs, latents = [], []
        for size in [(16, 16), (32, 32), (64, 64), (64, 32)]:
            coords = Coordinates.full(1, size)
            with torch.no_grad():
                out = coords.scatter(decoder(smooth(coords), t, z, coords))
                outputs.append(F.interpolate(out, (SIZE, SIZE), mode="area"))
                latents.append(encoder(smooth(coords), coords))
        errors = [(out - outputs[1]).square().mean().sqrt() / outputs[1].std() for out in outputs]
        coarse.append(errors[0])
        fine += errors[2:]
        latent += [(one - latents[0]).norm() / latents[0].norm() for one in latents[1:]]
    assert sum(coarse) / len(coarse) < 0.1 and sum(fine) / len(fine) < 0.05 and sum(latent) / len(latent) < 0.08


def test_t_and_z_change_the_output_and_every_parameter_learns():
    values, t, z, coords = draw()
    decoder, encoder = tiny_decoder(), tiny_encoder()
    out = decoder(values, t, z, coords)
    torch.testing.assert_close(decoder(values, t.float(), z, coords), out)
    for changed in (decoder(values, (t + 400) % 1000, z, coords), decoder(values, t, z + 1, coords)):
        assert (changed - out).abs().max() > 1e-3 * out.std()
    decoder(values, t, encoder(values, coords), coords).square().sum().backward()
    assert all(p.grad.any() for network in (decoder, encoder) for p in network.parameters())


def test_every_block_after_the_grid_takes_the_output_of_its_counterpart():
    values, t, z, coords = draw()
    decoder, outputs, inputs = tiny_decoder(), [], []
    for block in decoder.points_to_grid.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    for merge in decoder.merges:
        merge.register_forward_pre_hook(lambda module, args: inputs.append(args[0][..., 8:]))
    decoder(values, t, z, coords)
    assert len(inputs) == len(outputs) == 2
    assert all(torch.equal(taken, skip) for taken, skip in zip(inputs, reversed(outputs), strict=True))


def test_axes_are_not_transposed():
    """A function of x alone, seen through a decoder of single taps, stays nearly one of x alone."""
    decoder, coords = tiny_decoder(num_conv_blocks=1, kernel_size=1), Coordinates.full(1, (32, 32))
    x = coords.positions[..., :1].repeat(1, 1, 3)
    out = coords.scatter(decoder(torch.sin(4 * x), torch.tensor([100]), torch.zeros(1, 6), coords))[..., 8:-8, 8:-8]
    along_x, along_y = (out[..., 1:] - out[..., :-1]).abs().mean(), (out[..., 1:, :] - out[..., :-1, :]).abs().mean()
    assert along_x > 2 * along_y


def test_stochastic_encoding():
    values, _, _, coords = draw()
    encoder = tiny_encoder(stochastic_encoding=True)
    z, mu, logvar = encoder(values, coords)
    assert z.shape == mu.shape == logvar.shape == (2, 6) and torch.equal(z, mu)
    with torch.no_grad():
        encoder.linear_out.bias[6:] = 2.0  # a standard deviation of about e, not e²
    encoder.train()
    z, mu, logvar = encoder(values, coords, torch.full((2, 6), 3.0))
    torch.testing.assert_close(z, mu + 3 * (logvar / 2).exp())
    draws = torch.stack([(encoder(values, coords)[0] - mu) / (logvar / 2).exp() for _ in range(30)])
    assert abs(draws.mean()) < 0.2 and abs(draws.std() - 1) < 0.15  # of 360 draws


@pytest.mark.parametrize("options", [{"backend": "torch_dense"}, {"uno_conv_type": "spectral"}])
def test_bfloat16_autocast_stays_close_and_has_gradients(options):
    values, t, z, coords = draw()
    decoder, encoder = tiny_decoder(**options), tiny_encoder(**options)
    expected, latent = decoder(values, t, z, coords), encoder(values, coords)
    with torch.autocast("cpu", torch.bfloat16):
        out, rough = decoder(values, t, z, coords), encoder(values, coords)
    (out.square().sum() + rough.square().sum()).backward()
    assert out.dtype == rough.dtype == torch.float32
    assert (out - expected).square().mean().sqrt() < 0.03 * expected.std()
    assert (rough - latent).norm() < 0.05 * latent.norm()
    for parameter in [*decoder.parameters(), *encoder.parameters()]:
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@pytest.mark.parametrize("conv_type", ["conv", "spectral"])
def test_gradients_agree_with_finite_differences(conv_type):
    values, t, z, coords = draw(size=(12, 10))
    decoder = tiny_decoder(backend="torch_dense", uno_conv_type=conv_type).double()
    inputs = [values.double().requires_grad_(), z.double().requires_grad_(), *decoder.parameters()]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(a.shape, dtype=a.dtype, generator=generator) for a in inputs]

    def loss():
        return decoder(inputs[0], t, inputs[1], coords).square().sum()

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(), inputs), directions, strict=True))
    values_at = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):  # to +1e-5, then to -1e-5
            for a, d in zip(inputs, directions, strict=True):
                a += step * d
            values_at.append(loss())
    torch.testing.assert_close((values_at[0] - values_at[1]) / 2e-5, slope, rtol=1e-5, atol=0)


def test_fewer_points_than_neighbours_are_refused():
    coords = Coordinates.random(1, (16, 16), 2)
    with pytest.raises(ValueError, match="k=3.* 2 "):
        tiny_decoder()(torch.zeros(1, 2, 3), torch.tensor([1]), torch.zeros(1, 6), coords)


@pytest.mark.parametrize("depthwise", [True, False])
def test_activation_checkpointing_changes_nothing_but_memory(depthwise):
    values, t, z, coords = draw()
    kept, gradients = [], []
    for checkpoint_activations in (False, True):
        config = tiny_config(uno_dropout=0.3, depthwise_sparse=depthwise)
        config.train.checkpoint_activations = checkpoint_activations
        torch.manual_seed(0)
        decoder, encoder = awake(build_decoder(config)).train(), awake(build_encoder(config)).train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.numel()) or x, lambda x: x):
            torch.manual_seed(1)  # of the dropout
            loss = decoder(values, t, encoder(values, coords), coords).square().mean()
        loss.backward()
        kept.append(sum(saved))
        gradients.append([p.grad for model in (decoder, encoder) for p in model.parameters()])
    assert kept[1] < 0.6 * kept[0]
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))
