"""Device, precision and memory of a run."""

import subprocess
import sys

import pytest
import torch
from ml_collections import ConfigDict
from torch import nn

from tests.scripts import ROOT
from utils.device import autocast, in_training, peak_memory_gb, resolve_compile, resolve_device, resolve_dtype
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_casts_all_weights_at_once_with_the_results_of_autocast(dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 5, bias=False))
    network.add_module("4", network[3])  # as a network that calls one layer twice
    network[3].weight.data = torch.randn(16, 16)
    network.unused = nn.Linear(2, 2)
    network.forward = lambda x: nn.Sequential(*list(network)[:5])(x)
    before, found = list(network.parameters()), []
    for function in (network, in_training(network, dtype, compiled=False)):
        network.zero_grad()
        with autocast(torch.device("cpu"), dtype):
            out = function(torch.ones(2, 3, 4, 4))
        out.float().square().sum().backward()
        found.append([out, *(parameter.grad for parameter in before)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert network.unused.weight.grad is None and all(a is b for a, b in zip(before, network.parameters(), strict=True))
    with pytest.raises(RuntimeError):
        function(torch.ones(2, 3, 9, 9))
    assert all(a is b for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize(("value", "device", "problem", "expected"), [
    ("auto", "cpu", "", False), ("auto", "cuda", "", True), ("auto", "cuda", "no compiler", False),
    (True, "cpu", "no compiler", True), (False, "cuda", "", False)])
def test_networks_are_compiled_on_a_gpu_that_triton_supports(value, device, problem, expected, monkeypatch):
    monkeypatch.setattr("utils.device.triton_problem", lambda: problem)
    assert resolve_compile(ConfigDict({"compile": value}), torch.device(device)) is expected
