"""The error against the exact flow of random fields, on samples whose error is known."""

import math
import re

import pytest
import torch

from data.random_fields import MODES, spectrum
from diffusion.mollifier import GaussianMollifier
from experiments.metrics.images import exact_flow
from tests.data.test_random_fields import coefficients
from tests.scripts import only_line, run_script
from utils.files import write_json
from utils.images import save_png, to_uint8
from utils.rng import sample_generators

SCRIPT, CONFIG = "experiments/flow_error.py", "configs/random_fields_flow_config.py"


@pytest.mark.parametrize("size, scale, error", [((32, 32), 1.0, 0.0), ((40, 48), 0.8, 0.2)])
def test_samples_of_a_known_error(tmp_path, size, scale, error):
    mollifier = GaussianMollifier(1.0, 32)
    noise = mollifier.noise_like(torch.empty(3, 1, *size), sample_generators("cpu", range(3), 5, "image"))
    for i, image in enumerate(scale * mollifier.sharpen(exact_flow(noise, spectrum(), (32, 32)))):
        save_png(to_uint8(image.clamp(-1, 1)), tmp_path / f"{i:05d}.png")
    write_json(tmp_path / "settings.json", {"seed": 5, "sampler": "jump", "steps": 1})
    result = run_script(SCRIPT, "--config", CONFIG, "--samples", tmp_path)
    assert result.code == 0 and f"3 samples of {size[0]}x{size[1]}, 1 evaluations of jump" in result.out
    assert float(re.search(r"error (\S+)", result.out)[1]) == pytest.approx(error, abs=0.01)


def test_mistakes_are_one_line(tmp_path):
    save_png(torch.zeros(1, 32, 32, dtype=torch.uint8), tmp_path / "00000.png")
    assert "--samples is missing" in only_line(run_script(SCRIPT, "--config", CONFIG))
    assert "settings.json" in only_line(run_script(SCRIPT, "--config", CONFIG, "--samples", tmp_path))
    other = "configs/random_fields_config.py"
    assert "z_dim" in only_line(run_script(SCRIPT, "--config", other, "--samples", tmp_path))


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_the_exact_flow_leads_from_noise_to_mollified_fields(size):
    """Ends have the power of mollified fields in every coefficient, at any size; it is linear in the noise."""
    mollifier = GaussianMollifier(1.0, 32)
    noise = mollifier.noise_like(torch.empty(600, 1, *size).double(), torch.Generator().manual_seed(0))
    end = exact_flow(noise, spectrum(), (32, 32))
    torch.testing.assert_close(exact_flow(2 * noise, spectrum(), (32, 32)), 2 * end)
    power = coefficients(end[:, 0]).square().mean(0)[:MODES, :MODES]
    k1, k2 = torch.meshgrid(torch.arange(MODES), torch.arange(MODES), indexing="ij")
    wanted = spectrum().double() * torch.exp(-(math.pi / 32) ** 2 * (k1**2 + k2**2).double())
    large = wanted > 1e-7 * wanted.max()
    score = (power / wanted - 1)[large] * math.sqrt(len(end) / 2)
    assert large.sum() > 300 and abs(score.mean()) < 4 / large.sum() ** 0.5 and 0.8 < score.std() < 1.2
