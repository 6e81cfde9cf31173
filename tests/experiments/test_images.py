"""Scores of images: closed forms, a slow obvious search, and networks with a known denoising error."""

import math

import numpy as np
import pytest
import torch

from data.loader import oriented, to_float
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.mollifier import GaussianMollifier
from diffusion.parameterisation import Parameterisation
from diffusion.schedules import Schedule, make_betas
from experiments.metrics.images import (
    HIGHEST,
    denoising_errors,
    log_ratio,
    nearest_images,
    psnr,
    radial_spectrum,
    reconstruction_scores,
    roughness,
    ssim,
)

SIZE, STEPS = 16, 50  # of the denoising error
YARDSTICK = GaussianMollifier(1.0, SIZE)
NEAREST = GaussianMollifier(1.0, (12, 16))  # of the search for nearest images


def noise(seed, *shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_psnr_of_a_constant_difference():
    truth = torch.full((3, 8, 9), 100, dtype=torch.uint8)
    assert psnr(truth + 10, truth) == psnr(truth - 10, truth) == pytest.approx(20 * math.log10(25.5))
    assert psnr(truth, truth) == HIGHEST
    part = torch.zeros(1, 8, 9, dtype=torch.bool)
    part[:, :2] = True
    changed = torch.where(part, truth + 10, truth)
    assert psnr(changed, truth, part) == psnr(truth + 10, truth)
    assert psnr(changed, truth, ~part) == HIGHEST
    assert psnr(changed, truth) == pytest.approx(psnr(truth + 10, truth) + 10 * math.log10(4))


def test_ssim_knows_equal_opposite_and_unrelated_images():
    for channels in (1, 3):
        image, other = noise(0, channels, 16, 19), noise(1, channels, 16, 19)
        assert ssim(image, image) == pytest.approx(1)
        assert ssim(255 - image, image) < -0.8
        assert abs(ssim(other, image)) < 0.2


def test_roughness_counts_steps_within_a_region_and_across_its_border():
    inside = torch.zeros(1, 6, 6, dtype=torch.bool)
    inside[:, 1:5, 1:5] = True
    flat = torch.full((1, 6, 6), 50, dtype=torch.uint8)
    assert roughness(flat, inside) == (0, 0)
    assert roughness(torch.where(inside, flat + 3, flat), inside) == (0, 3 * 16)  # four sides of four pixels
    stripes = torch.where(torch.arange(6) % 2 == 0, flat, flat + 2)
    assert roughness(stripes, inside) == (2 * 3 * 4, 2 * 8)


def test_perfect_reconstructions_are_their_own_nearest():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mollifier = GaussianMollifier(1.0, 16)
    noisy = images + 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    scores = reconstruction_scores(images, noisy, mollifier)
    assert scores["nearest_is_own"] == 6
    assert scores["mollified_psnr"] == pytest.approx(10 * torch.log10(
        4 / mollifier.blur(noisy - images).square().mean((1, 2, 3))).mean().item(), rel=1e-3)
    assert reconstruction_scores(images, images.roll(1, 0), mollifier)["nearest_is_own"] == 0
    twice = torch.nn.functional.interpolate(images, scale_factor=2)
    assert reconstruction_scores(images, twice, mollifier)["nearest_is_own"] == 6


def mode(k1, k2, height, width):
    """ψ_k1(y) ψ_k2(x) at the pixel centres, [1, 1, H, W]."""
    def axis(k, length):
        u = (torch.arange(length, dtype=torch.float64) + 0.5) / length
        return torch.cos(math.pi * k * u) * math.sqrt(2 if k else 1)
    return torch.outer(axis(k1, height), axis(k2, width))[None, None]


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (24, 17)])
@pytest.mark.parametrize("k1, k2, wavenumber, modes", [(0, 0, 0, 1), (0, 1, 1, 3), (3, 4, 5, 8), (5, 0, 5, 8)])
def test_a_single_mode_is_in_one_bin_with_the_same_power_at_any_size(size, k1, k2, wavenumber, modes):
    """By hand: as many (k1, k2) with k1, k2 >= 0 round to the wavenumber; 3 of length 1 are (0, 1), (1, 0), (1, 1)."""
    power = radial_spectrum(0.3 * mode(k1, k2, *size))
    assert len(power) == min(size)
    expected = np.zeros(min(size))
    expected[wavenumber] = 0.09 / modes
    np.testing.assert_allclose(power, expected, atol=1e-15)


def test_the_mean_is_over_images_and_channels():
    images = torch.cat([mode(0, 2, 8, 8), mode(0, 3, 8, 8)], dim=1)
    np.testing.assert_allclose(radial_spectrum(images), radial_spectrum(images.flip(1)))
    np.testing.assert_allclose(radial_spectrum(torch.cat([images, 0 * images])), radial_spectrum(images) / 2)
    np.testing.assert_allclose(radial_spectrum(images)[2], radial_spectrum(images[:, :1])[2] / 2)


def test_log_ratio_over_a_band():
    wanted = np.array([1.0, 2, 4, 8, 16])
    assert log_ratio(10 * wanted, wanted, 4) == pytest.approx((1, 1))
    power = wanted * [1e9, 10, 0.1, 1, 1e9]
    assert log_ratio(power, wanted, 3) == pytest.approx((2 / 3, 0))


class Images:
    """A data set of given uint8 images [N, C, H, W]."""

    def __init__(self, images, turns=(0,)):
        self.images = images
        self.orientations = [(turn, mirrored) for mirrored in (False, True) for turn in turns]
        self.size = tuple(images.shape[-2:])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (23, 3, 12, 16), dtype=torch.uint8, generator=generator))


@pytest.fixture
def queries():
    return torch.rand(5, 3, 12, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("batch_size, turns", [(1, (0,)), (4, (0,)), (23, (0,)), (23, (0, 1, 2, 3))])
def test_nearest_images_are_those_of_the_search_through_all_pairs(dataset, queries, batch_size, turns):
    dataset, queries, mollifier = Images(dataset.images[..., :12], turns), queries[..., :12], GaussianMollifier(1.0, 12)
    found = nearest_images(queries, dataset, mollifier, k=4, batch_size=batch_size)
    for i, query in enumerate(queries):
        pairs = []
        for item, image in enumerate(dataset.images):
            forms = [(mollifier.blur(query) - mollifier.blur(to_float(oriented(image, one)))).square().mean().item()
                     for one in dataset.orientations]
            pairs.append((min(forms), item, forms.index(min(forms))))
        expected = sorted(pairs)[:4]
        torch.testing.assert_close(found.distance[i], torch.tensor([pair[0] for pair in expected]))
        assert found.item[i].tolist() == [pair[1] for pair in expected]
        assert found.orientation[i].tolist() == [pair[2] for pair in expected]


def test_copies_and_mirrored_copies_are_found(dataset):
    copies = torch.stack([to_float(dataset[7]), to_float(dataset[2]).flip(-1)])
    found = nearest_images(copies, dataset, NEAREST, k=1)
    assert found.item.flatten().tolist() == [7, 2] and found.orientation.flatten().tolist() == [0, 1]
    assert found.distance.max() < 1e-5


def test_a_limit_spreads_over_the_data_set(dataset, queries):
    found = nearest_images(queries, dataset, NEAREST, k=5, limit=5)
    assert all(sorted(items) == [0, 4, 9, 13, 18] for items in found.item.tolist())
    assert nearest_images(queries, dataset, NEAREST, k=30, limit=100).item.shape == (5, 23)


def test_images_of_another_size_are_brought_to_that_of_the_data_set(dataset):
    large = torch.nn.functional.interpolate(to_float(dataset[3])[None], scale_factor=3, mode="bicubic")
    assert nearest_images(large, dataset, NEAREST, k=1).item.item() == 3


def smooth_images(count=10):
    generator = torch.Generator().manual_seed(0)
    smooth = GaussianMollifier(2.0, SIZE).noise_like(torch.empty(count, 3, SIZE, SIZE), generator)
    return Images((smooth * 400 + 128).clamp(30, 225).to(torch.uint8))


def diffusion(sigma, kind):
    schedule = Schedule.from_betas(make_betas("cosine", STEPS, SIZE))
    mollifier = GaussianMollifier(sigma, SIZE)
    return GaussianDiffusion(schedule, mollifier, Parameterisation(kind, schedule, mollifier))


def encode_whole(values, coords, max_points=None):
    """A latent that is the image itself."""
    return values.flatten(1)


def knows_all(sigma, kind):
    """A decoder that knows x_0 and predicts exactly what it should."""
    process = diffusion(sigma, kind)

    def decoder(x, time, z, coords):
        x0 = coords.scatter(z.unflatten(1, (-1, 3)))
        t = (time * STEPS / 1000).round().long()
        state = coords.scatter(x)
        a, b = (process.schedule.at(name, t, x0) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
        blurred = (state - a * process.mollifier.blur(x0)) / b  # T xi
        if kind == "mollified_epsilon":
            return coords.gather(blurred)
        assert process.mollifier.is_identity  # xi cannot be had back otherwise
        return coords.gather({"epsilon": blurred, "v": a * blurred - b * x0, "xstart": x0}[kind])

    return {"encoder": encode_whole, "decoder": decoder}, process


@pytest.mark.parametrize(("sigma", "kind"), [(1.0, "mollified_epsilon"), (0.0, "epsilon"), (0.0, "v"), (0.0, "xstart"),
                                             (0.5, "mollified_epsilon")])
def test_a_network_that_knows_all_makes_no_error(sigma, kind):
    modules, process = knows_all(sigma, kind)
    assert denoising_errors(modules, process, smooth_images(), YARDSTICK, batch_size=4).max() < 1e-4


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_a_network_that_sees_nothing_errs_by_the_image(sigma):
    """One that always answers x_0 = 0 errs by the mean square of the blurred images, whatever its mollifier."""
    modules = {"encoder": encode_whole, "decoder": lambda x, time, z, coords: torch.zeros_like(x)}
    images = smooth_images()
    expected = YARDSTICK.blur(torch.stack([to_float(image) for image in images.images])).square().mean().item()
    found = denoising_errors(modules, diffusion(sigma, "xstart"), images, YARDSTICK, batch_size=3)
    assert (found * torch.tensor([3, 3, 2, 2])).sum() / 10 == pytest.approx(expected, rel=1e-4)


def test_steps_spread_over_the_chain():
    seen = []

    def decoder(x, time, z, coords):
        seen.extend(time.tolist())
        return torch.zeros_like(x)

    modules = {"encoder": encode_whole, "decoder": decoder}
    denoising_errors(modules, diffusion(1.0, "xstart"), smooth_images(), YARDSTICK, batch_size=4)
    assert seen == pytest.approx([(i * STEPS // 10) * 1000 / STEPS for i in range(10)])
