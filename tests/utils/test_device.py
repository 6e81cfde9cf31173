"""Device and precision from a config."""

import pytest
import torch
from ml_collections import ConfigDict

from utils.device import autocast, resolve_device, resolve_dtype
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


def test_autocast_changes_products_and_float32_does_not():
    a = torch.randn(4, 4)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), torch.float32):
        assert (a @ a).dtype == torch.float32
