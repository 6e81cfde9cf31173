import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.coordinates import Coordinates
from models import load
from tests.models.tiny import SIZE, tiny_config, tiny_latent_config


class Casts(TorchDispatchMode):
    """Counts how often one of these tensors is converted to another dtype."""

    def __init__(self, tensors):
        super().__init__()
        self.addresses, self.count = {tensor.data_ptr() for tensor in tensors}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function == torch.ops.aten._to_copy.default and arguments[0].data_ptr() in self.addresses:
            self.count += 1
        return function(*arguments, **(options or {}))


def test_autocast_casts_the_weights_of_convolutions_once_in_all_evaluations(monkeypatch):
    config = tiny_config()
    monkeypatch.setattr(load, "load_trained", lambda *_: {"facts": {}, "ema": {}})
    monkeypatch.setattr(load, "load_weights", lambda *_: None)
    decoder = load.load_autoencoder(config, torch.device("cpu"))[0]["decoder"]
    kernels = [parameter for parameter in decoder.grid_unet.parameters() if parameter.dim() == 4]
    coords, z = Coordinates.full(1, (SIZE, SIZE)), torch.zeros(1, config.model.z_dim)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), Casts(kernels) as casts:
        for _ in range(3):
            decoder(torch.zeros(1, SIZE**2, 3), torch.zeros(1), z, coords)
    assert not decoder.training and casts.count == len(kernels) > 0


def test_a_latent_model_is_loaded_alike(monkeypatch):
    facts = {"encoder": "e", "mean": torch.zeros(6), "std": torch.ones(6)}
    monkeypatch.setattr(load, "load_trained", lambda *_: {"facts": facts, "ema": {}})
    monkeypatch.setattr(load, "load_weights", lambda *_: None)
    monkeypatch.setattr(load, "digest", lambda _: "e")
    model, _, _ = load.load_latent_model(tiny_latent_config(), torch.device("cpu"), torch.nn.Identity())
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
