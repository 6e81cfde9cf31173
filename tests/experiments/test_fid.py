"""Distances against clean-fid and closed forms, cached statistics, a whole comparison, and the protocol."""

import json

import cleanfid.fid
import numpy as np
import pytest
import scipy.linalg
import torch

from data.datasets.folder import Folder
from experiments.lib.image_folders import SampleFolder
from experiments.metrics import fid
from experiments.metrics.features import NETWORKS, FeatureModel
from experiments.metrics.fid import (
    cached_statistics,
    compare,
    departures,
    describe,
    frechet_distance,
    kernel_distance,
    kid,
    precision_recall,
    read_record,
    score,
    statistics,
)
from tests.data.layouts import picture

WIDTH = 12  # features of the comparison; fewer than images, since clean-fid's root of a singular matrix is inexact


def random_covariance(generator, width, rank=None):
    factor = generator.normal(size=(width, rank or width))
    return factor @ factor.T / width


def with_covariance(mean, covariance, count=400):
    """Vectors whose sample mean and covariance are the given ones, up to float32."""
    white = np.random.default_rng(5).normal(size=(count, len(mean)))
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("width", [1, 5, 64])
def test_frechet_distance_of_commuting_covariances(width):
    """For S_a = Q diag(a) Qᵀ, S_b = Q diag(b) Qᵀ the distance is |m_a - m_b|² + Σ (√a - √b)²."""
    generator = np.random.default_rng(width)
    rotation, _ = np.linalg.qr(generator.normal(size=(width, width)))
    a, b = generator.uniform(0.1, 3, size=(2, width))
    mean_a, mean_b = generator.normal(size=(2, width))
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = frechet_distance(mean_a, rotation * a @ rotation.T, mean_b, rotation * b @ rotation.T)
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("width", [3, 20, 65])
def test_frechet_distance_against_the_matrix_square_root(width):
    generator = np.random.default_rng(width)
    a, b = random_covariance(generator, width), random_covariance(generator, width)
    mean_a, mean_b = generator.normal(size=(2, width))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.square(mean_a - mean_b).sum() + np.trace(a + b - 2 * root)
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean_b, b, mean_a, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_against_clean_fid(any_scipy):
    generator = np.random.default_rng(0)
    a = generator.normal(size=(300, 24)) @ generator.normal(size=(24, 24))
    b = generator.normal(size=(200, 24)) @ generator.normal(size=(24, 24)) + 0.3
    expected = cleanfid.fid.fid_from_feats(a, b)
    found = score(statistics(a), statistics(b))["frechet"]
    assert found == pytest.approx(expected, rel=1e-5)  # features are stored in float32
    given = (a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert frechet_distance(*given) == pytest.approx(cleanfid.fid.frechet_distance(*given), rel=1e-9)


def test_frechet_distance_is_zero_for_equal_sets_and_never_negative():
    generator = np.random.default_rng(1)
    for count, width in [(500, 16), (10, 64), (4, 128)]:
        features = 100 * generator.normal(size=(count, width))
        found = score(*2 * [statistics(features)])["frechet"]
        assert 0 <= found < 1e-6 * np.square(features).sum() / count
    zero = np.zeros((3, 3))
    assert frechet_distance(np.zeros(3), zero, np.zeros(3), zero) == 0


def test_frechet_distance_of_fewer_images_than_dimensions():
    """Covariances of rank below D; those in orthogonal subspaces have tr (S_a S_b)^½ = 0."""
    generator = np.random.default_rng(2)
    features = np.zeros((2, 12, 512))
    features[0, :, :40], features[1, :, 40:80] = generator.normal(size=(2, 12, 40))
    a, b = (statistics(one) for one in features)
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance)
    assert frechet_distance(*a[:2], *b[:2]) == pytest.approx(expected, rel=1e-9)

    low_a, low_b = (generator.normal(size=(12, 512)) for _ in range(2))
    a, b = np.cov(low_a, rowvar=False), np.cov(low_b, rowvar=False)
    # tr (S_a S_b)^½ is the sum of the singular values of A Bᵀ, where S_a = Aᵀ A and S_b = Bᵀ B
    root_a, root_b = ((low - low.mean(0)) / np.sqrt(11) for low in (low_a, low_b))
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    expected = np.square(low_a.mean(0) - low_b.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * overlap
    assert frechet_distance(low_a.mean(0), a, low_b.mean(0), b) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_from_features_with_known_moments():
    generator = np.random.default_rng(3)
    a, b = random_covariance(generator, 6) + np.eye(6), random_covariance(generator, 6) + np.eye(6)
    mean = np.arange(6.0)
    expected = frechet_distance(mean, a, -mean, b)
    found = score(statistics(with_covariance(mean, a)), statistics(with_covariance(-mean, b)))["frechet"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shapes", [[(3,), (3, 3), (4,), (4, 4)], [(3,), (3,), (3,), (3, 3)],
                                    [(3,), (3, 3), (3,), (4, 4)]])
def test_frechet_distance_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"must be \[D\]"):
        frechet_distance(*(np.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("count", [4, 100, 9000])
def test_statistics_are_numpys(count):
    features = np.random.default_rng(count).normal(3, 2, size=(count, 7)).astype(np.float32)
    found = statistics(features)
    assert found.count == count and found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.mean, features.mean(0, dtype=np.float64), rtol=1e-12)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.features, features)


def test_statistics_keep_a_random_part_of_many_features(monkeypatch):
    monkeypatch.setattr(fid, "KERNEL_FEATURES", 50)
    features = np.arange(200, dtype=np.float32)[:, None]
    found = statistics(features)
    kept = found.features[:, 0]
    assert found.count == 200 and found.mean == pytest.approx(99.5)
    assert len(set(kept)) == 50 and set(kept) < set(features[:, 0]) and 60 < kept.mean() < 140


@pytest.mark.parametrize("features", [np.zeros((3, 5)), np.zeros(5), np.full((5, 2), np.nan), np.full((5, 2), np.inf)])
def test_statistics_refuse(features):
    with pytest.raises(ValueError, match="features"):
        statistics(features)


def test_kernel_distance_is_its_definition():
    generator = np.random.default_rng(4)
    x, y = generator.normal(size=(5, 3)), generator.normal(size=(7, 3))

    def kernel(u, v):
        return (sum(u[i] * v[i] for i in range(3)) / 3 + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
    across = np.mean([kernel(u, v) for u in x for v in y])
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)


@pytest.mark.parametrize("count", [4, 33, 900])
def test_kid_of_one_subset_is_clean_fids(count):
    generator = np.random.default_rng(count)
    a, b = generator.normal(size=(count, 16)), generator.normal(0.2, 1.1, size=(count, 16))
    expected = cleanfid.fid.kernel_distance(a, b, num_subsets=1)
    assert kid(a, b)[0] == pytest.approx(expected, rel=1e-8)


def test_kid_of_many_subsets_is_clean_fids_of_the_same_ones(monkeypatch):
    generator = np.random.default_rng(6)
    a, b = generator.normal(size=(35, 8)), generator.normal(0.5, 1, size=(35, 8))
    value, _ = kid(a, b, subset_size=11)
    generator = np.random.default_rng(0)  # three disjoint subsets of either
    of_a, of_b = (generator.permutation(35)[:33].reshape(3, 11) for _ in range(2))
    draws = iter([subset for pair in zip(of_a, of_b, strict=True) for subset in pair])
    monkeypatch.setattr(np.random, "choice", lambda *_, **__: next(draws))
    assert value == pytest.approx(cleanfid.fid.kernel_distance(b, a, num_subsets=3, max_subset_size=11), rel=1e-6)


@pytest.mark.parametrize(("count_a", "count_b", "subset_size"),
                         [(20, 20, 1000), (25, 61, 1000), (60, 45, 10), (60, 60, 30)])
def test_kid_is_unbiased_and_its_standard_error_honest(count_a, count_b, subset_size):
    """Two samples of one distribution: zero on average, with the spread that is claimed, or less."""
    generator = np.random.default_rng(7)
    repeats = [kid(generator.normal(size=(count_a, 4)), generator.normal(size=(count_b, 4)), subset_size)
               for _ in range(400)]
    values, errors = np.array(repeats).T
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    claimed = np.sqrt(np.square(errors).mean())
    assert values.std() < 1.3 * claimed
    assert claimed < 8 * values.std()
    assert errors.std() < 0.6 * errors.mean()  # two subsets alone would give an error that is anywhere above zero


def test_kid_does_not_depend_on_the_order_of_subsets_or_a_global_seed():
    generator = np.random.default_rng(8)
    a, b = generator.normal(size=(300, 8)), generator.normal(size=(200, 8))
    np.random.seed(1)
    first = kid(a, b, subset_size=50)
    np.random.seed(2)
    assert kid(a, b, subset_size=50) == first


def test_kid_refuses_too_few_images():
    with pytest.raises(ValueError, match="KID needs 4"):
        kid(np.zeros((3, 2)), np.zeros((9, 2)))


# -- statistics on disk --


@pytest.fixture
def count_calls():
    """A compute() that knows how often it was called."""
    def compute():
        compute.calls += 1
        return statistics(np.random.default_rng(0).normal(size=(12, 5)))

    compute.calls = 0
    return compute


def check_equal(found, expected):
    assert found.count == expected.count
    for name in ("mean", "covariance", "features"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype


def test_a_hit_is_what_was_computed(tmp_path, count_calls):
    made = cached_statistics(tmp_path / "statistics", "faces", {"data": "abc"}, count_calls)
    found = cached_statistics(tmp_path / "statistics", "faces", {"data": "abc"}, count_calls)
    assert count_calls.calls == 1
    check_equal(found, made)
    files = list((tmp_path / "statistics").iterdir())
    assert len(files) == 1 and files[0].name.startswith("faces_") and files[0].suffix == ".npz"


@pytest.mark.parametrize("other", [{"data": "abd"}, {"data": "abc", "size": 64}, "abc"])
def test_another_key_is_computed_anew(tmp_path, count_calls, other):
    cached_statistics(tmp_path, "faces", {"data": "abc"}, count_calls)
    cached_statistics(tmp_path, "faces", other, count_calls)
    assert count_calls.calls == 2


def test_a_file_that_belongs_to_another_key_is_replaced(tmp_path, count_calls):
    cached_statistics(tmp_path, "faces", "first", count_calls)
    stale = next(tmp_path.iterdir()).read_bytes()
    cached_statistics(tmp_path, "faces", "second", count_calls)
    for path in tmp_path.iterdir():
        path.write_bytes(stale)
    cached_statistics(tmp_path, "faces", "second", count_calls)
    assert count_calls.calls == 3
    cached_statistics(tmp_path, "faces", "second", count_calls)
    assert count_calls.calls == 3


def cut(content, made):
    return content[:len(content) // 2]


def flip_a_bit(content, made):
    middle = content.index(made.features.tobytes()) + made.features.nbytes // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda *_: b"", lambda *_: b"no archive"])
def test_a_damaged_file_is_replaced(tmp_path, count_calls, damage):
    made = cached_statistics(tmp_path, "faces", "key", count_calls)
    path = next(tmp_path.iterdir())
    path.write_bytes(damage(path.read_bytes(), made))
    check_equal(cached_statistics(tmp_path, "faces", "key", count_calls), made)
    assert count_calls.calls == 2
    cached_statistics(tmp_path, "faces", "key", count_calls)
    assert count_calls.calls == 2 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", [{"covariance": np.zeros((4, 4))}, {"features": np.zeros((3, 4))}, {"mean": None},
                                    {"mean": np.array([None] * 5)}])
def test_a_file_with_other_arrays_is_replaced(tmp_path, count_calls, change):
    made = cached_statistics(tmp_path, "faces", "key", count_calls)
    content = {**made._asdict(), "key": repr("key"), **change}
    np.savez(next(tmp_path.iterdir()), **{name: value for name, value in content.items() if value is not None})
    check_equal(cached_statistics(tmp_path, "faces", "key", count_calls), made)
    assert count_calls.calls == 2


def test_an_interrupted_write_leaves_the_old_file(tmp_path, count_calls, monkeypatch):
    def interrupted(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_statistics(tmp_path, "faces", "key", count_calls)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_only_a_warning(tmp_path, count_calls, caplog):
    (tmp_path / "file").write_text("")
    made = cached_statistics(tmp_path / "file" / "statistics", "faces", "key", count_calls)
    check_equal(made, count_calls())
    assert "could not be saved" in caplog.text


# -- a whole comparison, against clean-fid on the same folders with the same network --


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

    def _split(self, paths, train, by_class=False):
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
    assert found["real"] == {"name": "folder", "split": "train", "size": [24, 24]} and found["flips"] is False
    whole = run()
    assert whole["count_a"] == 40 and whole["crops"] is whole["crop_size"] is None
    assert len(list(tmp_path.iterdir())) == 2  # statistics of crops are not taken for those of images


# -- the protocol --

PAPER = {"score": "FID_CLIP", "value": 3.87, "kid": 0.001, "kid_standard_error": 0.0001, "precision": 0.7,
         "recall": 0.5, "samples": "samples/ffhq", "num_samples": 50_000, "num_real_images": 70_000, "size": [256, 256],
         "real": {"name": "ffhq", "split": "all", "size": [256, 256]},
         "real_images": ["ffhq: 66500 training images of 256x256", "ffhq: 3500 held-out images of 256x256"],
         "sampling": {"sampler": "ddim", "steps": 100, "eta": 0.0, "inv_snr": 0.05, "window": None,
                      "latent_sampler": "ddpm", "latent_steps": 1000},
         "feature_model": "clip_vit_b_32", "crops": None, "crop_size": None, "flips": False}
CHURCHES = {**PAPER, "num_real_images": 126_227, "real": {"name": "churches", "split": "train", "size": [256, 256]}}


def changed(record, fact, value):
    """The record with another value of a fact, which may be one of `sampling` or `real`."""
    section, _, name = fact.rpartition(".")
    return {**record, section: {**record[section], name: value}} if section else {**record, name: value}


@pytest.mark.parametrize("record", [PAPER, CHURCHES])
def test_the_papers_protocol_departs_in_nothing(record):
    assert departures(record) == [] and describe(record).endswith("features of clip_vit_b_32; the paper's")


def test_the_protocol_is_described():
    assert describe(PAPER) == (
        "50000 samples of 256x256 by ddim in 100 steps from latents by ddpm in 1000 steps; ffhq: 66500 training "
        "images of 256x256 and ffhq: 3500 held-out images of 256x256; 8 bits, not flipped; features of clip_vit_b_32; "
        "the paper's")


@pytest.mark.parametrize("record, fact, value, phrases", [
    (PAPER, "num_samples", 10_000, ["10000 samples"]),
    (PAPER, "size", [1024, 1024], ["samples of 1024x1024", "real images of 256x256"]),
    (PAPER, "sampling.sampler", "dpm_solver", ["sampler=dpm_solver"]),
    (PAPER, "sampling.steps", 20, ["steps=20"]),
    (PAPER, "sampling.eta", 0.5, ["eta=0.5"]),
    (PAPER, "sampling.inv_snr", 0.1, ["inv_snr=0.1"]),
    (PAPER, "sampling.window", [[0, 9], [0, 9]], ["window=[[0, 9], [0, 9]]"]),
    (PAPER, "sampling.latent_sampler", "ddim", ["latent_sampler=ddim"]),
    (PAPER, "sampling.latent_steps", 20, ["latent_steps=20"]),
    (PAPER, "sampling", {}, ["an unknown sampler"]),
    (PAPER, "sampling", {"what": "noise"}, ["noise"]),
    (PAPER, "real.name", "folder", ["real images of folder"]),
    (PAPER, "real.split", "train", ["split=train"]),
    (CHURCHES, "real.split", "all", ["split=all"]),
    (PAPER, "num_real_images", 3500, ["3500 real images"]),
    (PAPER, "real.size", [128, 128], ["real images of 128x128"]),
    (PAPER, "feature_model", "inception_v3", ["features of inception_v3"]),
    (PAPER, "crops", 2000, ["crops instead of resized images"]),
    (PAPER, "flips", True, ["flipped real images"]),
])
def test_every_departure_is_named(record, fact, value, phrases):
    other = changed(record, fact, value)
    assert departures(other) == phrases
    assert describe(other).endswith(f"not the paper's, with {', '.join(phrases)}")


def test_only_records_of_scores_are_read(tmp_path):
    """Files of other origin, and scores without facts that the protocol needs, are none."""
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(PAPER))
    assert read_record(path) == PAPER
    others = ["", "[]", "3", "{", '{"kid": 0.1}', json.dumps({**PAPER, "kid": "low"}),
              *(json.dumps({name: value for name, value in PAPER.items() if name != missing}) for missing in
                ("kid", "sampling", "real", "num_real_images", "flips"))]
    for text in others:
        path.write_text(text)
        assert read_record(path) is None, text
