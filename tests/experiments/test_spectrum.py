"""spectrum.py on samples with a known spectrum."""

import json

import pytest
import torch
from PIL import Image

from data.datasets import build_dataset
from diffusion.gaussian_diffusion import build_diffusion
from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, write_config_file
from utils.images import save_png, to_uint8

SCRIPT, COUNT = "experiments/spectrum.py", 40


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, config file): fields as a perfect model samples them, at two sizes, and fields of half the amplitude."""
    folder = tmp_path_factory.mktemp("spectrum")
    config = tiny_config(folder / "out", name="function", img_size=32)
    config.data.function, config.data.channels = "data.random_fields:gaussian_field", 1
    config.data.num_functions, config.data.num_heldout_functions = COUNT, 2 * COUNT
    mollifier = build_diffusion(config).mollifier
    for name, size, factor in (("perfect", 32, 1), ("fine", 64, 1), ("faint", 32, 0.5)):
        (folder / name).mkdir()
        fields = build_dataset(config, True, size)
        for i in range(COUNT):
            field = fields.exact(i)[None]
            sample = mollifier.sharpen(mollifier.blur(field)) if name != "faint" else field
            save_png(to_uint8(factor * sample[0]), folder / name / f"{i:05d}.png")
    return folder, write_config_file(config, folder / "config.py")


def test_the_distance_is_sampling_error_for_perfect_samples_and_large_for_faint_ones(made, tmp_path):
    folder, config = made
    names = [folder / name for name in ("perfect", "fine", "faint")]
    result = run_script(SCRIPT, "--config", config, "--samples", ",".join(map(str, names)), "--output", tmp_path / "s")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "s" / "spectrum.json").read_text())
    assert found["wavenumbers"] == [1, 24]  # where exp(−(π²/2) k²/32²) = 0.05: k = 24.9
    perfect, fine, faint = found["sizes"]
    assert [row["size"] for row in found["sizes"]] == [[32, 32], [64, 64], [32, 32]]
    assert all(row["count"] == COUNT for row in found["sizes"])
    for row in (perfect, fine):
        assert row["distance"] < 2 * row["distance_of_true"] < 0.12 and abs(row["bias"]) < 0.03
    # half the amplitude, unfiltered: a quarter of the power, which is what filtered fields keep at the end of the band
    assert faint["bias"] == pytest.approx(-0.55, abs=0.07) and faint["distance"] > 5 * faint["distance_of_true"]
    coarse, dense = (torch.tensor(row["spectra"]["true_unfiltered"])[1:25] for row in (perfect, fine))
    assert (coarse / dense).log10().abs().max() < 0.02  # the functions are the same
    assert Image.open(tmp_path / "s" / "spectrum.png").size[0] > 400
    assert "32x32, 40 samples: mean |log10 ratio|" in result.out


@pytest.mark.parametrize("flags, said", [
    ([], "--samples is missing"),
    (["--samples=nowhere"], "=nowhere is not a folder"),
    (["--samples={}/perfect", "--config.data.num_heldout_functions=79"], "40 images, and twice as many held-out"),
    (["--samples={}/perfect", "--config.data.img_size=64"], "of 32x32, fewer pixels than the 49 wavenumbers"),
    (["--samples={}/perfect", "--output={}/config.py"], "config.py' is not a folder; choose another"),
])
def test_mistakes(made, tmp_path, flags, said):
    folder, config = made
    result = run_script(SCRIPT, "--config", config, f"--output={tmp_path / 's'}", *(f.format(folder) for f in flags))
    assert said in only_line(result) and not (tmp_path / "s").exists()
