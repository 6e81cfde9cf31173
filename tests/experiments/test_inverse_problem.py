"""Inverse problems as a user solves them, on a tiny model."""

import json
import sys
import types

import numpy as np
import pytest
import torch

from data.images import read_image
from diffusion.operators import Mask
from experiments.lib.operators import build_operator
from tests.scripts import only_line, run_script
from utils.errors import UserError

SCRIPT = "experiments/inverse_problem.py"
FEW = ("--num_samples=1", "--num_posterior_samples=3", "--sampling_steps=3")


def solve(trained, output, *flags):
    """scores.json of a run."""
    result = run_script(SCRIPT, *trained[1], *FEW, "--output", output, *flags)
    assert result.code == 0, result.err
    return json.loads((output / "scores.json").read_text())


def test_the_results_and_their_arrays(trained, tmp_path):
    scores = solve(trained, tmp_path / "o", "--operator=downsampling:8+points:5@1", "--save_npy")
    assert scores["count"] == 1 and scores["deviation"] > 0 and 0 <= scores["coverage"] <= 1
    assert scores["linear_error"] < 0.5 * scores["error"]  # the network has learned nothing
    for name in ("originals", "linear", "means", "deviations", "samples"):
        assert len(list((tmp_path / "o" / name).glob("*.png"))) == (3 if name == "samples" else 1)
    samples = np.stack([np.load(tmp_path / "o" / "samples" / f"0000{i}.npy") for i in range(3)])
    mean, deviation = (np.load(tmp_path / "o" / name / "00000.npy") for name in ("means", "deviations"))
    assert samples.shape == (3, 3, 16, 16) and np.load(tmp_path / "o" / "data_00000.npy").shape == (3 * 8 * 8 + 5,)
    np.testing.assert_allclose(samples.mean(0), mean, atol=1e-6)
    np.testing.assert_allclose(samples.std(0, ddof=1), deviation, atol=1e-6)


@pytest.mark.slow
def test_the_posterior_rule_reduces_the_misfit_even_of_a_network_that_has_learned_nothing(trained, tmp_path):
    """Of the 8² values that are measured of 16² pixels, compared with samples that no rule corrects."""
    def misfit(name, *flags):
        solve(trained, tmp_path / name, "--operator=downsampling:8", "--noise=0.02", "--sampling_steps=15",
              "--save_npy", *flags)
        data, *samples = (torch.from_numpy(np.load(tmp_path / name / file)) for file in (
            "data_00000.npy", *(f"samples/0000{i}.npy" for i in range(3))))
        operator = build_operator("downsampling:8", (3, 16, 16), 0.02, 0, 0, "cpu")
        return (operator.A(torch.stack(samples)) - data).square().mean().sqrt()

    nothing = misfit("nothing", "--rule=guidance", "--guidance=0")
    assert misfit("posterior") < 0.7 * nothing


@pytest.mark.slow
def test_the_batch_does_not_matter_and_another_resolution_works(trained, tmp_path):
    for name, *flags in (("a",), ("b", "--config.train.sample_size=1"), ("c", "--sample_img_size=18x20")):
        solve(trained, tmp_path / name, "--operator=points:9", *flags)
    first, second, other = (read_image(tmp_path / name / "means" / "00000.png").int() for name in "abc")
    assert (first - second).abs().max() <= 1 and other.shape == (3, 18, 20)


class Deepinv(torch.nn.Module):
    """The interface of a linear physics class of deepinv: the right half of an image, twice."""

    def __init__(self, noise_model):
        super().__init__()
        self.noise_model = noise_model

    def A(self, x, **kwargs):
        return 2 * x[..., x.shape[-1] // 2:]

    def A_adjoint(self, y, **kwargs):
        return torch.cat([torch.zeros_like(y), 2 * y], dim=-1)

    def noise(self, x, **kwargs):
        return x


def test_physics_of_deepinv_as_an_object_and_from_a_factory(monkeypatch):
    module = types.ModuleType("my_physics")
    module.noisy = Deepinv(types.SimpleNamespace(sigma=torch.tensor(0.3)))
    module.make = lambda image_shape, noise: Deepinv(types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "my_physics", module)
    for name, level in (("noisy", 0.3), ("make", 0.1), ("noisy+points:5", 0.1)):
        operator = build_operator(f"my_physics:{name}", (3, 4, 6), 0.1, 0, 0, "cpu")
        assert operator.noise == pytest.approx(level)
        if "+" not in name:
            assert operator.A(torch.ones(1, 3, 4, 6)).sum() == 2 * 3 * 4 * 3


def test_an_operator_of_a_user(monkeypatch):
    module = types.ModuleType("my_operators")

    class Half(Mask):
        def __init__(self, image_shape, noise):
            super().__init__(torch.arange(image_shape[-1]) < image_shape[-1] // 2, noise)

    class Wrong(Half):
        def A_adjoint(self, data):
            return 2 * data

    module.Half, module.Wrong, module.Nothing = Half, Wrong, lambda image_shape, noise: None
    monkeypatch.setitem(sys.modules, "my_operators", module)
    operator = build_operator("my_operators:Half", (3, 4, 6), 0.1, 0, 0, "cpu")
    assert operator.A(torch.ones(1, 3, 4, 6)).sum() == 3 * 4 * 3 and operator.noise == 0.1
    for name, message in (("Wrong", "A_adjoint is not the adjoint of A"), ("Nothing", "without A and A_adjoint"),
                          ("Absent", "has no 'Absent'")):
        with pytest.raises(UserError, match=message):
            build_operator(f"my_operators:{name}", (3, 4, 6), 0.1, 0, 0, "cpu")


@pytest.mark.parametrize("text", ["points", "points:0", "downsampling:17", "mask:2", "mask:x", "blur:nan", "nothing",
                                  "points:3@3", "points:3@x", "points:3+", ""])
def test_an_operator_that_cannot_be_is_one_line(text):
    with pytest.raises(UserError, match=f"--operator={text.replace('+', '.')}"):
        build_operator(text, (3, 16, 16), 0.1, 0, 0, "cpu")


@pytest.mark.parametrize("text", ["mask:0.03", "mask:strokes", "blur:0.02", "projections:8"])
def test_random_operators_depend_on_the_image_alone(text):
    image = torch.rand(1, 2, 16, 18)
    first, again, other = (build_operator(text, (2, 16, 18), 0.1, 0, index, "cpu").A(image) for index in (0, 0, 1))
    assert torch.equal(first, again) and torch.equal(first, other) == (not text.startswith("mask"))


@pytest.mark.parametrize("flags, message", [
    (["--operator=points:x"], "--operator=points:x"), (["--noise=0"], "noise"),
    (["--rule=guidance", "--sampler=ddim"], "--sampler=ddim does not apply")])
def test_mistakes_are_one_line(trained, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in only_line(run_script(SCRIPT, *trained[1], *FEW, *flags))
    assert not list(tmp_path.iterdir())
