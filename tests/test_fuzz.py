"""Random sizes, densities, dtypes and extreme values, chosen by hypothesis, against the slow references."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from data.coordinates import KINDS, Coordinates
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.mollifier import GaussianMollifier
from diffusion.timestep_samplers import build_timestep_sampler
from experiments.lib.sampling import parse_image_size, parse_window
from models.build import build_decoder, build_encoder, build_latent_model
from models.interpolation import grid_to_points, knn_to_grid, nearest_pixels
from models.sparse_conv import sparse_conv
from tests.reference import interpolation as reference_interpolation
from tests.reference import mollifier as reference_mollifier
from tests.reference import sparse_conv as reference_conv
from tests.tiny import tiny_config, tiny_latent_config
from utils.config import read_autoencoder_config, read_latent_config
from utils.errors import UserError
from utils.rng import generator, sample_generators

pytestmark = pytest.mark.slow
SIDES = st.integers(1, 9)
SEEDS = st.integers(0, 2**32)
SCALES = st.sampled_from([1e-18, 1e-3, 1.0, 1e3, 1e18])  # of features: far from 1, but products stay in float32
SIGMAS = st.one_of(st.sampled_from([0.0, 1e-310, 1e-30, 1e30, 1e300]), st.floats(1e-3, 1e3))


def fuzz(examples):
    """Settings of a test whose examples are a function of the test alone."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@st.composite
def point_sets(draw, least=1):
    """Coordinates of at least `least` pixels per image, in any order."""
    size = draw(SIDES), draw(SIDES)
    if size[0] * size[1] < least:
        size = size[0], least
    pixels, batch = size[0] * size[1], draw(st.integers(1, 2))
    points = draw(st.one_of(st.integers(least, pixels), st.just(pixels), st.just(least)))
    order = torch.rand(batch, pixels, generator=generator("cpu", draw(SEEDS))).argsort(1)
    return Coordinates.full(batch, size) if draw(st.booleans()) else Coordinates(order[:, :points], size)


def features_at(coords, channels, seed, dtype=torch.float32):
    return torch.randn(coords.batch, coords.num_points, channels, generator=generator("cpu", seed)).to(dtype)


def close(actual, expected, share):
    """True if the largest error is at most `share` of the expected root mean square."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return (actual.double() - expected).abs().max() <= share * expected.square().mean().sqrt()


@fuzz(150)
@given(st.data())
def test_coordinates_are_a_set_of_pixels_whatever_the_batch(data):
    size, batch = (data.draw(SIDES), data.draw(SIDES)), data.draw(st.integers(1, 3))
    count, kind = data.draw(st.integers(1, size[0] * size[1])), data.draw(st.sampled_from(KINDS))
    seed = data.draw(SEEDS)
    coords = Coordinates.random(batch, size, count, kind, sample_generators("cpu", range(batch), seed))
    Coordinates(coords.index, size)  # raises unless distinct and in range
    assert coords.index.shape == (batch, count) and (coords.index.diff(dim=1) > 0).all()
    last = Coordinates.random(1, size, count, kind, sample_generators("cpu", [batch - 1], seed))
    assert torch.equal(last.index[0], coords.index[-1])
    values = features_at(coords, 2, seed)
    image = coords.scatter(values, fill=data.draw(st.floats(width=32)))
    assert torch.equal(coords.gather(image), values)
    for pixels, table in zip(coords.index.tolist(), coords.table.tolist(), strict=True):
        assert [table[pixel] for pixel in pixels] == list(range(count)) and table.count(-1) == len(table) - count


@fuzz(150)
@given(SIDES, SIDES, st.lists(st.integers(-2, 82), max_size=6))
def test_coordinates_accept_distinct_pixels_and_nothing_else(height, width, pixels):
    valid = len(set(pixels)) == len(pixels) and all(0 <= pixel < height * width for pixel in pixels)
    index = torch.tensor([pixels], dtype=torch.int64)
    if valid:
        assert Coordinates(index, (height, width)).num_points == len(pixels)
    else:
        with pytest.raises(ValueError):
            Coordinates(index, (height, width))


@fuzz(40)
@given(point_sets(), st.sampled_from(["torch_dense", "numba"]), st.sampled_from([1, 3, 5, 11]),
       st.sampled_from([1, 3, 7]), st.sampled_from([1, 3, 8, 17]), st.booleans(), SCALES,
       st.sampled_from([(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)]), SEEDS)
def test_operator_and_gradients_agree_with_the_loops(coords, backend, kh, kw, channels, depthwise, scale, kind, seed):
    dtype, tolerance = kind
    features = (features_at(coords, channels, seed) * scale).to(dtype).requires_grad_()
    shape = (kh, kw, channels) if depthwise else (kh, kw, channels, 3)
    weight = torch.randn(shape, generator=generator("cpu", seed, "weight")).to(dtype).requires_grad_()
    out = sparse_conv(features, weight, coords, backend)
    grad = torch.randn(out.shape, generator=generator("cpu", seed, "grad")).to(dtype)
    out.backward(grad)
    arrays = *(tensor.detach().double().numpy() for tensor in (features, weight)), coords.index.numpy(), coords.size
    expected = reference_conv.sparse_conv(*arrays)
    assert out.dtype == dtype and close(out, expected, tolerance)
    for tensor, wanted in zip((features, weight), reference_conv.sparse_conv_gradients(
            *arrays, grad.double().numpy()), strict=True):
        assert close(tensor.grad, wanted, tolerance)


@fuzz(40)
@given(point_sets(least=3), st.integers(1, 7), st.integers(1, 3), SCALES, SEEDS)
def test_nearest_pixels_and_interpolation_agree_with_exact_search(coords, grid_size, k, scale, seed):
    features = features_at(coords, 2, seed) * scale
    places = [nearest_pixels(coords, grid_size, k, backend)[0] for backend in ("numba", "torch_dense")]
    grid = knn_to_grid(features, coords, grid_size, k)
    back = grid_to_points(grid, coords)
    for image, pixels in enumerate(coords.index.tolist()):
        exact = reference_interpolation.nearest(pixels, coords.size, grid_size, k)
        wanted = [[found[2] for found in node] for node in exact]
        for place in places:
            assert [row[:len(found)] for row, found in zip(place[image].tolist(), wanted, strict=True)] == wanted
        values = features[image].double().numpy()
        assert close(grid[image], reference_interpolation.knn_to_grid(
            values, pixels, coords.size, grid_size, k), 1e-4)
        assert close(back[image], reference_interpolation.grid_to_points(
            grid[image].double().numpy(), pixels, coords.size), 1e-4)


@fuzz(100)
@given(SIDES, SIDES, st.tuples(SIDES, SIDES), SIGMAS, SCALES, SEEDS)
def test_mollifier_agrees_with_scipy(height, width, train, sigma, scale, seed):
    mollifier, size = GaussianMollifier(sigma, train), (height, width)
    x = scale * torch.randn(1, 2, *size, dtype=torch.float64, generator=generator("cpu", seed))
    kept = np.ones(size)
    if sigma:
        with np.errstate(over="ignore"):
            kept = reference_mollifier.attenuation(size, [sigma * s / t for s, t in zip(size, train, strict=True)])
    wiener = kept / (kept**2 + mollifier.wiener_eps**2) if sigma else kept
    assert close(mollifier.blur(x), reference_mollifier.filtered(x.numpy(), kept), 1e-9)
    assert close(mollifier.sharpen(x), reference_mollifier.filtered(x.numpy(), wiener), 1e-9)
    noise = mollifier.noise_like(x.float(), generator("cpu", seed))
    assert noise.shape == x.shape and noise.dtype == torch.float32 and noise.isfinite().all()


WORDS = ("", "auto", "none", "cpu", "conv", "spectral", "cosine", "linear", "const0.01", "constx", "mse",
         "rescaled_mse", "v", "xstart", "epsilon", "mollified_epsilon", "dct", "halton", "../x", "a\nb", "$(touch x)")
VALUES = st.one_of(
    st.integers(-3, 40), st.sampled_from([10**30, -(10**30)]), st.booleans(), st.sampled_from(WORDS), st.floats(),
    st.none(), st.lists(st.integers(-1, 9), max_size=4).map(tuple), st.just(("a",)), st.just({}), st.just({"x": 1}))
CONFIGS = {"autoencoder": (tiny_config, read_autoencoder_config),
           "latent": (tiny_latent_config, read_latent_config)}
# large values of these would exhaust the memory
UNBOUNDED = ("nf", "uno_base_channels", "hid_channels", "z_dim", "time_emb_dim", "time_embed_dim", "steps",
             "num_layers", "num_conv_blocks", "kernel_size", "uno_res", "img_size", "q_sample", "knn_neighbours")


@pytest.mark.parametrize("kind", CONFIGS)
@fuzz(100)
@given(st.data())
def test_a_config_is_refused_in_one_line_or_builds(kind, data):
    make, read = CONFIGS[kind]
    config = make("nowhere").to_dict()
    for _ in range(data.draw(st.integers(1, 2))):
        section = data.draw(st.sampled_from(sorted(config)))
        if not isinstance(config[section], dict):
            continue
        field = data.draw(st.sampled_from([*sorted(config[section]), "unheard_of"]))
        value = data.draw(VALUES)
        if field not in UNBOUNDED or not isinstance(value, int) or value < 10**9:
            config[section][field] = value
    try:
        checked = read(SimpleNamespace(name="config", value=ConfigDict(config)))
        json.loads(json.dumps(checked.to_dict(), allow_nan=False))  # what is accepted can be written down
        if kind == "latent":
            build_latent_model(checked)
        else:
            build_encoder(checked)
            build_decoder(checked)
        build_timestep_sampler(checked)
        build_diffusion(checked)
    except UserError as error:
        assert len(str(error)) > 20  # and of another exception the test would fail


@fuzz(200)
@given(st.one_of(st.text(max_size=8), st.from_regex(r"-?\d{1,5}(x\d{0,5})?", fullmatch=True)))
def test_an_image_size_is_two_numbers_or_refused(text):
    try:
        height, width = parse_image_size(text, 64)
    except UserError as error:
        assert f"--sample_img_size={text}" in str(error)
    else:
        assert min(height, width) >= 16 and text in (str(height), f"{height}x{width}", text)


@fuzz(300)
@given(st.tuples(*[st.floats(0, 1)] * 4), st.tuples(st.integers(16, 5000), st.integers(16, 5000)))
@example((0.5, 0.0, 0.50000001, 1.0), (16, 16))  # a part of a pixel that rounding makes nothing of
@example((0.0, 1 - 1e-12, 1.0, 1.0), (16, 16))
def test_a_window_holds_the_pixels_that_it_touches(ends, size):
    (x0, y0, x1, y1), text = ends, " ".join(map(str, ends))
    if not (x0 < x1 and y0 < y1):
        with pytest.raises(UserError, match="must be four numbers"):
            parse_window(text, size)
        return
    for (first, end), length, low, high in zip(parse_window(text, size), size, (y0, x0), (y1, x1), strict=True):
        assert 0 <= first < end <= length
        assert first <= low * length + 1e-6 and high * length - 1e-6 <= end  # all of it
        assert low * length < first + 1 + 1e-6 and end - 1 < max(high * length, first + 1) + 1e-6  # and no more
