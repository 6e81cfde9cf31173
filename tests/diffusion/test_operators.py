"""Linear operators: their adjoints, their pseudo-inverses, and the same measurement at two resolutions."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.operators import (
    Blur,
    Channels,
    Downsampling,
    Mask,
    Points,
    Projections,
    Stack,
    adjoint_of,
    conjugate_gradients,
    pseudo_inverse,
)
from utils.rng import generator, rand, randn

SIZES = [(12, 12), (9, 9), (7, 16), (13, 10)]
CHANNELS = 3
BATCH = 2


def draw(*shape, seed=0, dtype=torch.float64):
    return randn(shape, generator("cpu", seed)).to(dtype)


def places(count, batch=1):
    return rand((batch, count, 2), generator("cpu", "places"))


OPERATORS = {
    "mask": lambda size: Mask(draw(BATCH, 1, *size) > 0, 0.1),
    "downsampling": lambda size: Downsampling(size, (5, 4), 0.1),
    "blur": lambda size: Blur(0.07, 0.1),
    "projections": lambda size: Projections(size, 6, 0.1),
    "points": lambda size: Points(places(11), size, 0.1),
    "points of each image": lambda size: Points(places(11, BATCH), size, 0.1),
    "channels": lambda size: Channels(Points(places(5), size, 0.1), [0, 2], CHANNELS),
    "stack": lambda size: Stack([Channels(Downsampling(size, (3, 4), 0.2), [1], CHANNELS), Points(places(5), size, 0.1),
                                 Projections(size, 4, 0.3)], (CHANNELS, *size)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_one(name, size, dtype):
    operator, image = OPERATORS[name](size), draw(BATCH, CHANNELS, *size, dtype=dtype)
    data = operator.A(image)
    other = draw(*data.shape, seed=1, dtype=dtype)
    back = operator.A_adjoint(other)
    assert data.dtype == back.dtype == dtype and back.shape == image.shape
    torch.testing.assert_close((data * other).sum(), (image * back).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(OPERATORS.keys() - {"blur"}))  # many of whose factors are too small to invert
def test_the_pseudo_inverse_fits_the_data_with_the_smallest_image(name, size):
    operator, image = OPERATORS[name](size), draw(BATCH, CHANNELS, *size)
    found = pseudo_inverse(operator, operator.A(image), iterations=500)
    torch.testing.assert_close(operator.A(found), operator.A(image), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((found * (image - found)).sum(), torch.zeros_like(image.sum()), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_stay_in_float32_under_autocast(name):
    size = (8, 8)
    operator, image = OPERATORS[name](size), draw(BATCH, CHANNELS, *size, dtype=torch.float32)
    data = operator.A(image)
    back = operator.A_adjoint(data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(operator.A(image), data)
        torch.testing.assert_close(operator.A_adjoint(data), back)


def smooth(size):
    """cos(πy) + cos(2πx) / 2 at the pixel centres, [1, 1, H, W]."""
    y, x = ((torch.arange(length, dtype=torch.float64) + 0.5) / length for length in size)
    return (torch.cos(torch.pi * y)[:, None] + torch.cos(2 * torch.pi * x) / 2)[None, None]


@pytest.mark.parametrize("sizes", [((32, 32), (64, 64)), ((31, 40), (62, 97))])
@pytest.mark.parametrize("name, make", {
    "downsampling": lambda size: Downsampling(size, (8, 8)), "projections": lambda size: Projections(size, 7),
    "points": lambda size: Points(places(50), size)}.items())
def test_an_operator_measures_the_same_of_a_function_at_every_resolution(name, make, sizes):
    first, second = (make(size).A(smooth(size)) for size in sizes)
    assert first.abs().max() > 0.5
    torch.testing.assert_close(first, second, rtol=0, atol=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_blur_is_the_same_factor_of_a_cosine_at_every_resolution(size):
    """exp(−(πσk)² / 2) for the k-th cosine."""
    y = ((torch.arange(size[0], dtype=torch.float64) + 0.5) / size[0])[:, None].expand(size)[None, None]
    image = torch.cos(3 * torch.pi * y)
    factor = torch.exp(torch.tensor(-((0.07 * 3 * torch.pi) ** 2) / 2, dtype=torch.float64))
    torch.testing.assert_close(Blur(0.07).A(image), factor * image)


def test_points_at_pixel_centres_are_the_pixels_and_between_them_means():
    image = draw(1, 2, 5, 8)
    centres = torch.tensor([[[(2 + 0.5) / 8, (3 + 0.5) / 5], [3 / 8, (3 + 0.5) / 5], [0.0, 1.0]]])
    values = Points(centres, (5, 8)).A(image)
    expected = torch.stack([image[:, :, 3, 2], image[:, :, 3, 2:4].mean(-1), image[:, :, 4, 0]], dim=-1)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_projections_are_means_of_bands():
    image = draw(1, 1, 6, 9)
    rows, columns = Projections((6, 9), 3).A(image)[0, 0]
    torch.testing.assert_close(rows, image[0, 0].mean(1).unflatten(0, (3, 2)).mean(1))
    torch.testing.assert_close(columns, image[0, 0].mean(0).unflatten(0, (3, 3)).mean(1))


@pytest.mark.parametrize("size, low_size", [
    ((16, 16), (8, 8)), ((15, 20), (5, 8)), ((12, 9), (12, 4)), ((33, 21), (32, 21))])
def test_downsampling_is_bicubic_resizing_with_antialiasing(size, low_size):
    image = draw(2, 3, *size, dtype=torch.float32)
    expected = F.interpolate(image, low_size, mode="bicubic", antialias=True)
    torch.testing.assert_close(Downsampling(size, low_size).A(image), expected, atol=1e-5, rtol=1e-5)


def test_a_stack_has_one_noise_level():
    """Measurements of sd 0.3 are divided by 3 beside those of sd 0.1."""
    operators = [Mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), noise) for noise in (0.1, 0.3)]
    stack, image = Stack(operators, (1, 4, 4)), draw(1, 1, 4, 4)
    assert stack.noise == 0.1
    torch.testing.assert_close(stack.A(image), torch.cat([image.flatten(1), image.flatten(1) / 3], dim=1))
    operators[0].noise = 0.0
    with pytest.raises(ValueError, match="without noise"):
        Stack(operators, (1, 4, 4))


def test_the_adjoint_by_autograd():
    weight, image = draw(4, 2, 3, 3), draw(2, 2, 9, 7)

    def forward(image):
        return F.conv2d(image, weight, padding=1)

    data = draw(2, 4, 9, 7, seed=1)
    back = adjoint_of(forward, data, image.shape)
    torch.testing.assert_close((forward(image) * data).sum(), (image * back).sum())


def test_conjugate_gradients_solve_each_system_of_a_batch():
    """One of them is zero, one singular, and they need unlike numbers of iterations."""
    roots = torch.stack([draw(6, 6), torch.eye(6, dtype=torch.float64), draw(6, 6, seed=1)])
    roots[2, :, :3] = 0
    matrices, wanted = roots @ roots.mT, draw(3, 6)
    wanted[0] = 0
    right = (matrices @ wanted[..., None])[..., 0]
    found = conjugate_gradients(lambda v: (matrices @ v[..., None])[..., 0], right, 50, 1e-9)
    torch.testing.assert_close((matrices @ found[..., None])[..., 0], right, rtol=1e-6, atol=1e-6)
    assert (found[0] == 0).all()
