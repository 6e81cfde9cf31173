"""All scores of a comparison, against clean-fid's own of the same folders through the same network."""

import cleanfid.fid
import numpy as np
import pytest
import torch

from data.datasets.folder import Folder
from experiments.lib.image_folders import SampleFolder
from experiments.metrics.features import NETWORKS, FeatureModel
from experiments.metrics.fid import compare
from experiments.metrics.precision_recall import precision_recall
from tests.data.layouts import picture

WIDTH = 12  # features, fewer than images: clean-fid's square root of a singular matrix is not exact to 1e-6


class Network(torch.nn.Module):
    """Pooled random convolutions, of 299x299 images of values 0 to 255."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, WIDTH, 23, stride=23)

    def forward(self, images):
        return self.conv(images / 128 - 1).relu().mean((2, 3))


class AllImages(Folder):
    """Of a folder, without a held-out part."""

    def _split(self, paths):
        return paths


@pytest.fixture(scope="module")
def network():
    return Network().eval()


@pytest.fixture(scope="module")
def model(network):
    kind = NETWORKS["inception_v3"]
    return FeatureModel("tiny", "FID", kind.size, kind.prepare, network, torch.device("cpu"), None, "0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(samples, real), 40 images of 24x24 each."""
    root = tmp_path_factory.mktemp("images")
    for name, first in (("samples", 0), ("real", 1000)):
        (root / name).mkdir()
        for i in range(40):
            picture(first + i, 24, 24).save(root / name / f"{i:05d}.png")
    return root / "samples", root / "real"


@pytest.fixture
def run(folders, model, tmp_path):
    def call(**options):
        samples, real = folders
        return compare(SampleFolder(samples), [AllImages(real, True, (24, 24), 3)], model, tmp_path, **options)

    return call


def clean_fid_features(folder, network):
    return cleanfid.fid.get_folder_features(str(folder), network, num_workers=0, batch_size=64, device="cpu",
                                            mode="clean", verbose=False).astype(np.float64)


def test_the_frechet_distance_is_clean_fids(run, folders, network, any_scipy):
    expected = cleanfid.fid.compute_fid(*map(str, folders), num_workers=0, batch_size=64, device="cpu",
                                        custom_feat_extractor=network, use_dataparallel=False, verbose=False)
    assert expected > 1e-3
    assert run()["frechet"] == pytest.approx(expected, rel=1e-6)


def test_the_kernel_distance_is_clean_fids(run, folders, network):
    samples, real = (clean_fid_features(folder, network) for folder in folders)
    expected = cleanfid.fid.kernel_distance(real, samples, num_subsets=1)  # of all images
    assert abs(expected) > 1e-6
    assert run()["kid"] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_precision_and_recall_are_those_of_the_features(run, folders, network):
    features = [clean_fid_features(folder, network) for folder in folders]
    for neighbours in (1, 3):
        found = run(neighbours=neighbours)
        assert (found["precision"], found["recall"]) == precision_recall(*features, neighbours)
        assert found["neighbours"] == neighbours and 0 < found["precision"] < 1


def test_the_record_says_what_was_compared(run, tmp_path):
    found = run(crops=25, crop_size=10)
    assert found["count_a"] == found["count_b"] == 25 and (found["crops"], found["crop_size"]) == (25, 10)
    assert (found["feature_model"], found["device"]) == ("tiny", "cpu")
    assert "40 training images of 24x24" in found["real_images"][0]
    whole = run()
    assert whole["count_a"] == 40 and whole["crops"] is whole["crop_size"] is None
    assert len(list(tmp_path.iterdir())) == 2  # statistics of crops are not taken for those of images
