import pytest
import torch
import torch.nn.functional as F

from data.coordinates import Coordinates
from models.build import build_decoder, build_encoder
from tests.models.tiny import SIZE, awake, draw, tiny_config, tiny_decoder, tiny_encoder
from utils.rng import sample_generators

SIZES = [(16, 16), (24, 24), (16, 40), (17, 13)]


def smooth(coords):
    """One function of [0, 1]² with three channels, at the coordinates."""
    x, y = coords.positions.unbind(-1)
    return torch.stack([torch.sin(3 * x + 1) * torch.cos(4 * y), x - y, torch.cos(5 * x * y)], dim=-1)


@pytest.mark.parametrize("size", SIZES)
def test_every_pixel_as_a_subset_in_any_order_equals_the_full_image(size):
    full = Coordinates.full(2, size)
    values, t, z, _ = draw(size=size, share=1)
    order = torch.stack([torch.randperm(size[0] * size[1]) for _ in range(2)])
    shuffled = Coordinates(order, size)
    decoder, encoder = tiny_decoder(), tiny_encoder()
    expected = full.scatter(decoder(values, t, z, full))
    there = shuffled.gather(full.scatter(values))
    torch.testing.assert_close(shuffled.scatter(decoder(there, t, z, shuffled)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(there, shuffled), encoder(values, full), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_the_order_of_the_points_does_not_matter(size):
    values, t, z, coords = draw(size=size)
    order = torch.randperm(coords.num_points)
    shuffled = Coordinates(coords.index[:, order], size)
    decoder, encoder = tiny_decoder(), tiny_encoder()
    out = decoder(values, t, z, coords)
    torch.testing.assert_close(decoder(values[:, order], t, z, shuffled), out[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(values[:, order], shuffled), encoder(values, coords), rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_see_the_rest_of_its_batch():
    values, t, z, coords = draw(batch=3)
    alone = Coordinates(coords.index[1:2], coords.size)
    out = tiny_decoder()(values, t, z, coords)[1:2]
    torch.testing.assert_close(tiny_decoder()(values[1:2], t[1:2], z[1:2], alone), out, rtol=1e-4, atol=1e-5)
    latent = tiny_encoder()(values, coords)[1:2]
    torch.testing.assert_close(tiny_encoder()(values[1:2], alone), latent, rtol=1e-4, atol=1e-5)


def test_one_function_gives_one_function_at_every_resolution():
    """Random networks, with kernels that change from tap to tap: some per cent off where 16 pixels discretise them, and
    less at more pixels."""
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
    assert sum(coarse) / len(coarse) < 0.1
    assert sum(fine) / len(fine) < 0.05
    assert sum(latent) / len(latent) < 0.08


def test_t_and_z_change_the_output():
    values, t, z, coords = draw()
    decoder = tiny_decoder()
    out = decoder(values, t, z, coords)
    assert torch.equal(decoder(values, t, z, coords), out)
    torch.testing.assert_close(decoder(values, t.float(), z, coords), out)
    for changed in (decoder(values, (t + 400) % 1000, z, coords), decoder(values, t, z + 1, coords)):
        assert (changed - out).abs().max() > 1e-3 * out.std()


def test_every_parameter_of_both_models_learns():
    values, t, z, coords = draw()
    decoder, encoder = tiny_decoder(), tiny_encoder()
    decoder(values, t, encoder(values, coords), coords).square().sum().backward()
    silent = [name for model in (decoder, encoder) for name, p in model.named_parameters() if not p.grad.any()]
    assert not silent


def test_every_block_after_the_grid_takes_the_output_of_its_counterpart():
    values, t, z, coords = draw()
    decoder, outputs, inputs = tiny_decoder(), [], []
    for block in decoder.points_to_grid.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    for merge in decoder.merges:
        merge.register_forward_pre_hook(lambda module, args: inputs.append(args[1]))
    decoder(values, t, z, coords)
    assert len(inputs) == len(outputs) == 2
    for taken, skip in zip(inputs, reversed(outputs), strict=True):
        assert torch.equal(taken, skip)


def test_axes_are_not_transposed():
    """A function of x alone, seen through a decoder without conditioning on position, stays nearly one of x alone."""
    decoder, coords = tiny_decoder(num_conv_blocks=1, kernel_size=1), Coordinates.full(1, (32, 32))
    x = coords.positions[..., :1].repeat(1, 1, 3)
    out = coords.scatter(decoder(torch.sin(4 * x), torch.tensor([100]), torch.zeros(1, 6), coords))[..., 8:-8, 8:-8]
    along_x, along_y = (out[..., 1:] - out[..., :-1]).abs().mean(), (out[..., 1:, :] - out[..., :-1, :]).abs().mean()
    assert along_x > 2 * along_y


@pytest.mark.parametrize("stochastic", [True, False])
def test_stochastic_encoding(stochastic):
    values, _, _, coords = draw()
    encoder = tiny_encoder(stochastic_encoding=stochastic)
    if not stochastic:
        assert encoder(values, coords).shape == (2, 6)
        assert torch.equal(encoder.train()(values, coords), encoder.eval()(values, coords))
        return
    z, mu, logvar = encoder(values, coords)
    assert z.shape == mu.shape == logvar.shape == (2, 6)
    assert torch.equal(z, mu)
    with torch.no_grad():
        encoder.linear_out.bias[6:] = 2.0  # a standard deviation of about e, not e²
    encoder.train()
    first, mu, logvar = encoder(values, coords, sample_generators("cpu", [0, 1], "z"))
    again, _, _ = encoder(values, coords, sample_generators("cpu", [0, 1], "z"))
    other, _, _ = encoder(values, coords, sample_generators("cpu", [2, 3], "z"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    draws = torch.stack([(encoder(values, coords)[0] - mu) / (logvar / 2).exp() for _ in range(30)])
    assert abs(draws.mean()) < 0.2 and abs(draws.std() - 1) < 0.15  # of 360 draws


@pytest.mark.parametrize("backend", ["auto", "torch_dense"])
@pytest.mark.parametrize("conv_type", ["conv", "spectral"])
def test_bfloat16_autocast_stays_close_and_has_gradients(backend, conv_type):
    values, t, z, coords = draw()
    decoder, encoder = (make(backend=backend, uno_conv_type=conv_type) for make in (tiny_decoder, tiny_encoder))
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


def test_the_geometry_is_computed_once_for_a_forward_pass(monkeypatch):
    from models import interpolation

    searches = []
    search = interpolation.nearest_pixels
    monkeypatch.setattr(interpolation, "nearest_pixels", lambda *a: searches.append(1) or search(*a))
    values, t, z, coords = draw()
    decoder, encoder = tiny_decoder(), tiny_encoder()
    for _ in range(2):
        decoder(values, t, z, coords)
    encoder(values, coords)
    assert len(searches) == 1


def test_fewer_points_than_neighbours_are_refused():
    coords = Coordinates.random(1, (16, 16), 2)
    with pytest.raises(ValueError, match="k=3.* 2 "):
        awake(tiny_decoder())(torch.zeros(1, 2, 3), torch.tensor([1]), torch.zeros(1, 6), coords)


def test_the_training_resolution_is_that_of_the_config():
    config = tiny_config()
    assert {block.train_size for block in tiny_decoder().blocks} == {config.data.img_size} == {SIZE}


@pytest.mark.parametrize("depthwise", [True, False])
def test_recomputed_activations_change_nothing_but_memory(depthwise):
    options = {"uno_dropout": 0.3, "depthwise_sparse": depthwise}
    values, t, z, coords = draw()
    kept, gradients = [], []
    for checkpoint_activations in (False, True):
        config = tiny_config(**options)
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
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
