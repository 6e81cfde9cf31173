"""Files of results: UTF-8 in any locale, written before anything is printed, in the home folder if a flag says ~."""

import io
import json
import locale

import pytest
import torch

from experiments.lib import benchmark_suites
from experiments.lib.image_folders import ImageFolder
from tests.data.layouts import write_folder
from tests.scripts import run_script
from tests.tiny import tiny_config, write_config_file


class ClosedByReader(io.StringIO):
    """A stream that fails at the first result."""

    def write(self, text):
        if "PSNR" in text or "|" in text:
            raise BrokenPipeError
        return len(text)


def two_folders(tmp_path, name):
    for part in ("a", "b"):
        ImageFolder(tmp_path / part, 2, {}).save(range(2), torch.zeros(2, 3, 16, 16))
    return [f"experiments/{name}.py", "--reference", tmp_path / "a", "--samples", tmp_path / "b"]


def knn_suite(tmp_path, name):
    config = write_config_file(tiny_config(tmp_path), tmp_path / "config.py")
    return [f"experiments/{name}.py", "--config", config, "--suites=knn", "--repeats=1"]


@pytest.mark.parametrize("name, make", [("compare_resolutions", two_folders), ("benchmark", knn_suite)])
def test_results_are_kept_if_they_cannot_be_printed(tmp_path, monkeypatch, name, make):
    monkeypatch.setattr(benchmark_suites, "KNN", [(1, (8, 8), 4)])
    command, output = make(tmp_path, name), tmp_path / "results.json"

    assert run_script(*command, "--output", output, out=ClosedByReader()).code == 0
    assert json.loads(output.read_text())


def test_a_report_is_utf_8_in_any_locale(trained, tmp_path):
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C")
        assert run_script("experiments/report.py", *trained[1], "--output", tmp_path / "page.html").code == 0
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert "∞-Diff" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_home_is_expanded_in_every_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "data", 41)
    write_config_file(tiny_config("nowhere", "elsewhere", "folder"), tmp_path / "config.py")
    made = run_script("experiments/generate_noise.py", "--config=~/config.py", "--config.data.root_dir=~/data",
                      "--output=~/noise")
    assert made.code == 0, made.err
    two_folders(tmp_path, "")
    compared = run_script("experiments/compare_resolutions.py", "--reference=~/a", "--samples=~/b,~/noise", "--output",
                          "~/scores.json")
    assert compared.code == 0, compared.err
    assert [row["folder"] for row in json.loads((tmp_path / "scores.json").read_text())] == [
        str(tmp_path / "b"), str(tmp_path / "noise")]
