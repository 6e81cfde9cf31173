"""--inv_snr is the epsilon of the Wiener filter in every script that samples, and part of what a folder records."""

import json
from pathlib import Path

import pytest

from diffusion.mollifier import GaussianMollifier
from tests.data.layouts import picture
from tests.scripts import only_line, run_script

pytestmark = pytest.mark.slow

SCORE = ["--feature_model=efficientnet_lite0", "--split=all", "--num_samples=4"]
TWO = ["--num_samples=2"]
SCRIPTS = {"generate_samples": TWO, "generate_recons": TWO, "inpaint": TWO, "calculate_fid": SCORE,
           "super_resolution": [*TWO, "--input=small"],
           "interpolate": ["--num_pairs=1", "--frames=2", "--directions=0"]}


@pytest.mark.parametrize("script, options", SCRIPTS.items(), ids=SCRIPTS)
def test_the_filter_has_the_epsilon_of_the_flag(trained, tmp_path, monkeypatch, script, options):
    used, sharpen = set(), GaussianMollifier.sharpen
    monkeypatch.setattr(GaussianMollifier, "sharpen",
                        lambda mollifier, x: (used.add(mollifier.wiener_eps), sharpen(mollifier, x))[1])
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    picture(0, 16, 16).save("small/00000.png")
    models = trained[2] if script in ("generate_samples", "calculate_fid") else trained[1]
    result = run_script(f"experiments/{script}.py", *models, "--sampling_steps=2", *options, "--inv_snr=0.2")
    assert result.code == 0, result.err
    assert used == {0.2}
    assert {json.loads(path.read_text())["inv_snr"] for path in tmp_path.rglob("settings.json")
            if "inv_snr" in path.read_text()} == {0.2}


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_a_filter_without_regularisation_is_refused(trained, value):
    assert "inv_snr" in only_line(run_script("experiments/generate_samples.py", *trained[2], f"--inv_snr={value}"))
