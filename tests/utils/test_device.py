"""Device, precision and memory of a run."""

import subprocess
import sys

import pytest
import torch
from ml_collections import ConfigDict

from tests.scripts import ROOT
from utils.device import autocast, peak_memory_gb, resolve_device, resolve_dtype
from utils.errors import UserError


def train(amp=True, precision="auto"):
    return ConfigDict({"amp": amp, "precision": precision})


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "mps", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(UserError, match=name):
            resolve_device(name)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_takes_bf16_where_the_processor_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr("utils.device._cpu_has_bf16", lambda: has_bf16)
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert resolve_dtype(train(), torch.device("cpu")) == expected
    assert resolve_dtype(train(amp=False), torch.device("cpu")) == torch.float32
    assert resolve_dtype(train(precision="fp32"), torch.device("cpu")) == torch.float32
    with pytest.raises(UserError, match="train.precision='fp16' needs a GPU"):
        resolve_dtype(train(precision="fp16"), torch.device("cpu"))


def test_autocast_changes_products_and_float32_does_not():
    a = torch.randn(4, 4)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), torch.float32):
        assert (a @ a).dtype == torch.float32


@pytest.mark.slow
def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    held = torch.ones(300 * 2**20)  # 1.26e9 bytes
    code = "import torch; from utils.device import peak_memory_gb; print(peak_memory_gb(torch.device('cpu')))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.05 < float(ran.stdout) < 1 < peak_memory_gb(torch.device("cpu"))
    del held
