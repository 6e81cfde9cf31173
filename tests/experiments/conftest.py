import types

import cleanfid.fid
import pytest
import scipy.linalg

from tests.data.layouts import write_folder
from tests.scripts import run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(folder, arguments of the autoencoder config, arguments of both configs) of a trained pair of models."""
    folder = tmp_path_factory.mktemp("trained")
    write_folder(folder / "data", 80)  # of which 4 are held out
    ae = write_config_file(tiny_config(folder / "checkpoints", folder / "data", "folder"), folder / "ae.py")
    latent = write_config_file(tiny_latent_config(folder / "checkpoints"), folder / "latent.py")
    single, both = ["--config", ae], ["--config", latent, "--decoder_config", ae]
    assert run_script("train_inf_ae_diffusion.py", *single).code == 0
    assert run_script("train_latent_diffusion.py", *both).code == 0
    return folder, single, both


@pytest.fixture
def any_scipy(monkeypatch):
    """clean-fid's formula where scipy's sqrtm has lost the argument `disp` that clean-fid passes."""
    def sqrtm(matrix, disp=True):
        root = scipy.linalg.sqrtm(matrix)
        return root if disp else (root, 0.0)

    monkeypatch.setattr(cleanfid.fid, "linalg", types.SimpleNamespace(sqrtm=sqrtm))
