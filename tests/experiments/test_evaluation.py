"""The figure that compares models: right for a perfect and for a blind network, whatever the mollifier."""

import pytest
import torch

from data.loader import to_float
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.mollifier import GaussianMollifier
from diffusion.parameterisation import Parameterisation
from diffusion.schedules import Schedule, make_betas
from experiments.metrics.images import STEPS_SHARE, denoising_error

SIZE, STEPS = 16, 50
YARDSTICK = GaussianMollifier(1.0, SIZE)


class Images:
    size = (SIZE, SIZE)

    def __init__(self, count=10):
        smooth = GaussianMollifier(2.0, SIZE).noise_like(torch.empty(count, 3, SIZE, SIZE),
                                                         torch.Generator().manual_seed(0))
        self.images = (smooth * 400 + 128).clamp(30, 225).to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def diffusion(sigma, kind):
    schedule = Schedule.from_betas(make_betas("cosine", STEPS, SIZE))
    mollifier = GaussianMollifier(sigma, SIZE)
    return GaussianDiffusion(schedule, mollifier, Parameterisation(kind, schedule, mollifier))


def encode_whole(values, coords):
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
    assert denoising_error(modules, process, Images(), YARDSTICK, batch_size=4) < 1e-4


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_a_network_that_sees_nothing_errs_by_the_image(sigma):
    """One that always answers x_0 = 0 errs by the mean square of the blurred images, whatever its mollifier."""
    modules = {"encoder": encode_whole, "decoder": lambda x, time, z, coords: torch.zeros_like(x)}
    images = Images()
    expected = YARDSTICK.blur(torch.stack([to_float(image) for image in images.images])).square().mean().item()
    found = denoising_error(modules, diffusion(sigma, "xstart"), images, YARDSTICK, batch_size=3)
    assert found == pytest.approx(expected, rel=1e-4)


def test_steps_spread_over_the_part_of_the_chain_that_counts():
    seen = []

    def decoder(x, time, z, coords):
        seen.extend(time.tolist())
        return torch.zeros_like(x)

    modules = {"encoder": encode_whole, "decoder": decoder}
    denoising_error(modules, diffusion(1.0, "xstart"), Images(), YARDSTICK, batch_size=4)
    last = int(STEPS_SHARE * STEPS)
    assert seen == pytest.approx([(i * last // 10) * 1000 / STEPS for i in range(10)])
