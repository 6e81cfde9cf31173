"""Files of weights: what is written comes back, what is not such a file is refused in one line."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils.checkpoint import WEIGHTS_FORMAT, DamagedCheckpoint, load_weights_file, save_weights
from utils.errors import UserError

SAVED = {"kind": "latent", "step": 7, "config": {"model": {"z_dim": 6, "uno_mults": (1, 2)}}, "environment": {"a": "b"},
         "ema": {"net.weight": torch.arange(6.0).view(2, 3), "net.bias": torch.ones(3)}, "source": "x",
         "facts": {"mean": torch.ones(3), "encoder": "digest"}}


def test_round_trip_and_names_that_others_understand(tmp_path):
    path = tmp_path / "below" / "w.safetensors"
    save_weights(path, SAVED)
    loaded = load_weights_file(path, "latent")
    assert loaded["step"] == 7 and loaded["config"]["model"] == {"z_dim": 6, "uno_mults": [1, 2]}
    assert loaded["ema"].keys() == SAVED["ema"].keys() and loaded["facts"].keys() == SAVED["facts"].keys()
    assert all(torch.equal(value, SAVED["ema"][name]) for name, value in loaded["ema"].items())
    assert torch.equal(loaded["facts"]["mean"], torch.ones(3)) and loaded["facts"]["encoder"] == "digest"
    assert torch.equal(load_file(path)["net.weight"], SAVED["ema"]["net.weight"])
    (tmp_path / "plain").touch()
    assert os.stat(path).st_mode == os.stat(tmp_path / "plain").st_mode  # readable by whom the user lets read
    assert os.listdir(path.parent) == ["w.safetensors"]


def test_what_is_no_such_file_is_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, SAVED)
    with pytest.raises(UserError, match="holds a latent, not a autoencoder"):
        load_weights_file(path, "autoencoder")
    content = path.read_bytes()
    for broken in (b"", b"text", content[:50], content[:-4]):
        path.write_bytes(broken)
        with pytest.raises(DamagedCheckpoint, match="not a readable file of weights") as error:
            load_weights_file(path, "latent")
        assert "\n" not in str(error.value)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match="was written by None"):
        load_weights_file(path, "latent")
    save_file({"a": torch.ones(1)}, path, {"written_by": WEIGHTS_FORMAT, "kind": "la"})
    with pytest.raises(DamagedCheckpoint, match="in its header"):
        load_weights_file(path, "latent")
