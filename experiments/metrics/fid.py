"""Scores of samples against real images in the features of one network: Fréchet distance (FID, FID_CLIP), KID,
precision and recall (docs/method.md, 7); statistics of real images on disk; the protocol of a score.
"""

import hashlib
import logging
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from experiments.metrics.features import PREPROCESSING_VERSION, Crops, extract
from utils import distributed
from utils.files import read_json, replacing

MIN_IMAGES = 4  # two subsets of two images, the fewest for a standard error of KID
KERNEL_FEATURES = 50_000  # feature vectors that a Statistics keeps
CHUNK = 4096  # rows converted to float64 at a time


class Statistics(NamedTuple):
    """Statistics of one set of images, sufficient for all scores.

    mean        float64 [D]
    covariance  float64 [D, D], unbiased (divided by count - 1)
    count       number of images
    features    float32 [n, D]: all features, or a random subset of KERNEL_FEATURES, for KID, precision and recall
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    features: np.ndarray


def statistics(features):
    """Statistics of a feature matrix [N, D], N >= 4. Raises ValueError for another shape or non-finite values."""
    features = np.asarray(features, dtype=np.float32)
    if features.ndim != 2 or len(features) < MIN_IMAGES:
        raise ValueError(f"features must be [N, D] with N >= {MIN_IMAGES}, got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features contain nan or infinity")
    count, width = features.shape
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((width, width))
    for start in range(0, count, CHUNK):  # 70,000 x 2048 in float64 would take another gigabyte
        centred = features[start:start + CHUNK] - mean
        covariance += centred.T @ centred
    covariance /= count - 1
    if count > KERNEL_FEATURES:
        features = features[np.random.default_rng(0).permutation(count)[:KERNEL_FEATURES]]
    return Statistics(mean, covariance, count, features)


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """Fréchet distance of two normal distributions, float >= 0, computed in float64 (docs/method.md, 7.1).

        |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½)                                    (Heusel et al. 2017, eq. 6)

    S_a S_b has the eigenvalues of the symmetric matrix S_a^½ S_b S_a^½, so its trace needs no square root of a general
    matrix, and singular covariances (fewer images than dimensions) are no special case. Takes means [D] and covariances
    [D, D]; raises ValueError for other shapes.
    """
    mean_a, covariance_a = np.asarray(mean_a, dtype=np.float64), np.asarray(covariance_a, dtype=np.float64)
    mean_b, covariance_b = np.asarray(mean_b, dtype=np.float64), np.asarray(covariance_b, dtype=np.float64)
    if mean_a.shape != mean_b.shape or not covariance_a.shape == covariance_b.shape == 2 * mean_a.shape:
        raise ValueError(f"means {mean_a.shape}, {mean_b.shape} and covariances {covariance_a.shape}, "
                         f"{covariance_b.shape} must be [D], [D], [D, D], [D, D]")
    root = _square_root(covariance_a)
    product = root @ covariance_b @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)
    distance = np.square(mean_a - mean_b).sum() + np.trace(covariance_a) + np.trace(covariance_b)
    return max(float(distance - 2 * np.sqrt(eigenvalues).sum()), 0.0)


def _square_root(covariance):
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # rounding may make zeros negative


def kernel_distance(x, y):
    """Unbiased estimate of MMD² with the kernel (u·v/D + 1)³, from x [n, D] and y [m, D] (docs/method.md, 7.2;
    Bińkowski et al. 2018)."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    within = [(np.sum(k) - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (_kernel(x, x), _kernel(y, y))]
    return float(sum(within) - 2 * _kernel(x, y).mean())


def _kernel(u, v):
    return (u @ v.T / u.shape[1] + 1) ** 3


def kid(features_a, features_b, subset_size=1000, seed=0):
    """(KID, its standard error), floats, of feature matrices [N, D] and [M, D] (docs/method.md, 7.2).

    KID is the mean of kernel_distance over disjoint random subsets of subset_size vectors, or over one smaller subset.
    The standard error needs about ten subsets; with fewer, it is computed from smaller ones, which overstates it.
    """
    fewest = min(len(features_a), len(features_b))
    if fewest < MIN_IMAGES:
        raise ValueError(f"KID needs {MIN_IMAGES} images on either side, got {len(features_a)} and {len(features_b)}")
    count = max(fewest // subset_size, 1)
    count_for_error = max(count, min(10, fewest // 2))
    largest = 2 * subset_size  # per subset of the larger set, to bound its kernel matrix
    estimates = _subset_estimates(features_a, features_b, count, largest, seed)
    spread = estimates
    if count_for_error > count:
        spread = _subset_estimates(features_a, features_b, count_for_error, largest, seed)
    return float(np.mean(estimates)), float(np.std(spread, ddof=1) / np.sqrt(len(spread)))


def _subset_estimates(features_a, features_b, count, largest, seed):
    generator = np.random.default_rng(seed)
    subsets = []
    for features in (features_a, features_b):
        size = min(len(features) // count, largest)
        subsets.append(generator.permutation(len(features))[:count * size].reshape(count, size))
    return [kernel_distance(features_a[a], features_b[b]) for a, b in zip(*subsets, strict=True)]


def score(a, b):
    """Fréchet distance and KID of two Statistics: {frechet, kid, kid_standard_error, count_a, count_b}."""
    value, standard_error = kid(a.features, b.features)
    return {"frechet": frechet_distance(a.mean, a.covariance, b.mean, b.covariance),
            "kid": value, "kid_standard_error": standard_error, "count_a": a.count, "count_b": b.count}


DAMAGED = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


def cached_statistics(folder, label, key, compute):
    """The Statistics stored for `key` in `folder`, or else compute(), whose result is stored.

    label  start of the file name, for readers
    key    printable; everything that the statistics depend on. Each key has its own file; a damaged file, or one with
           another key, is replaced.
    Rank 0 reads and writes. All ranks call compute(); the result of rank 0 is used.
    """
    path = Path(folder) / f"{label}_{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.npz"
    found = _read(path, repr(key)) if distributed.is_main() else None
    if distributed.any_rank(found is not None):
        logging.info("statistics of the real images from %s", path)
        return found
    made = compute()
    if not distributed.is_main():
        return made
    try:
        _write(path, repr(key), made)
    except OSError as error:  # the score is still valid
        logging.warning("statistics of the real images could not be saved to %s: %s", path, error)
    return made


def _read(path, key):
    try:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["key"]) != key:
                return None
            found = Statistics(archive["mean"], archive["covariance"], int(archive["count"]), archive["features"])
    except DAMAGED:
        return None
    width = len(found.mean)
    if found.covariance.shape != (width, width) or found.features.shape[1:] != (width,):
        return None
    return found


def _write(path, key, statistics):
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, key=key, **statistics._asdict())


def compare(samples, real, model, cache, crops=None, crop_size=None, neighbours=3, batch_size=64, num_workers=0):
    """All scores of samples against real images, and a description of both, as a dict of plain data.

    All ranks share the work; rank 0 returns the result, the others None.

    samples     sequence of uint8 [C, H, W] images with a common `size` (H, W), such as a SampleFolder
    real        data sets (data.datasets.base) that together are the real images; all of one size
    model       experiments.metrics.features.FeatureModel
    cache       folder for the statistics of the real images
    crops       number of random crops of crop_size² pixels to compare from either side; None: whole images, resized
    neighbours  k of precision and recall
    batch_size, num_workers   of the feature network, and worker processes that read and resize
    """
    def of(images, size, label):
        pieces = Crops(images, size, crops, crop_size) if crops else images
        features = extract(pieces, model, batch_size=batch_size, num_workers=num_workers, progress=label)
        return statistics(features) if distributed.is_main() else None

    key = {"fingerprints": [part.fingerprint() for part in real], "feature_model": model.name,
           "weights_sha256": model.sha256, "preprocessing": PREPROCESSING_VERSION, "crops": crops,
           "crop_size": crop_size if crops else None,
           "device": model.device.type}  # CLIP computes in half precision on a GPU
    height, width = size = real[0].size
    real_statistics = cached_statistics(cache, f"{real[0].name}_{height}x{width}_{model.name}", key,
                                        lambda: of(ConcatDataset(real), size, "real images"))
    sample_statistics = of(samples, samples.size, "samples")
    if not distributed.is_main():
        return None
    scores = score(sample_statistics, real_statistics)
    scores["precision"], scores["recall"] = precision_recall(sample_statistics.features, real_statistics.features,
                                                             neighbours, model.device)
    split = "all" if len(real) > 1 else "train" if real[0].train else "heldout"
    return {**scores, "neighbours": neighbours, "real": {"name": real[0].name, "split": split, "size": list(size)},
            "real_images": [part.describe() for part in real], "flips": False, **key}


PAPER_SIZES = {"celeba": (64, 128), "ffhq": (128, 256), "churches": (256,)}  # data.name -> resolutions of the paper
PAPER_SAMPLING = {"sampler": "ddim", "steps": 100, "eta": 0.0, "inv_snr": 0.05, "window": None,
                  "latent_sampler": "ddpm", "latent_steps": 1000}  # settings.json of the samples


def paper_split(name):
    """The real images of the paper's scores: "all" of FFHQ, the "train" part of other data sets."""
    return "all" if name == "ffhq" else "train"


def departures(record):
    """Phrases for all facts of a record of calculate_fid.py that are not those of the paper (docs/paper.md).

    Samples whose settings are unknown depart in one phrase.
    """
    made, real = record["sampling"], record["real"]
    size, real_size, name = tuple(record["size"]), tuple(real["size"]), real["name"]
    known, sides = "sampler" in made, PAPER_SIZES.get(name)
    facts = [
        (record["num_samples"] == 50_000, f"{record['num_samples']} samples"),
        (sides is None or size in zip(sides, sides, strict=True), "samples of {}x{}".format(*size)),
        (known, made.get("what", "an unknown sampler")),
        *((not known or made.get(setting) == value, f"{setting}={made.get(setting)}")
          for setting, value in PAPER_SAMPLING.items()),
        (sides is not None, f"real images of {name}"),
        (sides is None or real["split"] == paper_split(name), f"split={real['split']}"),
        (name != "ffhq" or record["num_real_images"] == 70_000, f"{record['num_real_images']} real images"),
        (real_size == size, "real images of {}x{}".format(*real_size)),
        (record["feature_model"] == "clip_vit_b_32", f"features of {record['feature_model']}"),
        (record["crops"] is None, "crops instead of resized images"),
        (not record["flips"], "flipped real images"),
    ]
    return [phrase for is_the_papers, phrase in facts if not is_the_papers]


def summary(record):
    """The scores of a record of calculate_fid.py, in one line."""
    return ("{score} {value:.2f} ({num_samples} samples, {num_real_images} real images) · KID {kid:.4f} ± "
            "{kid_standard_error:.4f} · precision {precision:.3f} · recall {recall:.3f}".format(**record))


def describe(record):
    """The protocol of a record of calculate_fid.py in one line, with every departure from the paper's."""
    made, differences = record["sampling"], departures(record)
    how = f", {made.get('what', 'made in an unknown way')}"
    if "sampler" in made:
        how = f" by {made['sampler']} in {made.get('steps')} steps"
    if "latent_sampler" in made:
        how += f" from latents by {made['latent_sampler']} in {made.get('latent_steps')} steps"
    crops = f"{record['crops']} crops of {record['crop_size']}² of each; " if record["crops"] else ""
    return ("{} samples of {}x{}".format(record["num_samples"], *record["size"])
            + f"{how}; {' and '.join(record['real_images'])}; {crops}8 bits, "
            + f"{'' if record['flips'] else 'not '}flipped; features of {record['feature_model']}; "
            + (f"not the paper's, with {', '.join(differences)}" if differences else "the paper's"))


def read_record(path):
    """The record that calculate_fid.py wrote to a JSON file; None if the file holds anything else."""
    record = read_json(path)
    try:
        summary(record), describe(record)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    return record


BLOCK = 2**24  # distances held at a time, 128 MB in float64


def precision_recall(samples, real, neighbours=3, device="cpu"):
    """(precision, recall), floats in [0, 1], of feature matrices [N, D] and [M, D] (eqs. 1 and 2).

    Precision is the share of samples in the manifold of the real images, recall the share of real images in the
    manifold of the samples. The manifold of a set is the union of balls around its members, each with the distance to
    the member's k-th nearest other member as radius.
    neighbours   k, at least 1
    device       computes distances in float64, since features may differ by little compared with their length
    Raises ValueError if a set has no k-th neighbour.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours} must be at least 1")
    fewest = min(len(samples), len(real))
    if fewest <= neighbours:
        raise ValueError(f"neighbours={neighbours} needs more than {neighbours} images on either side, got {fewest}")
    samples, real = (torch.as_tensor(x).to(device, torch.float64) for x in (samples, real))
    radius_of_samples, radius_of_real = _squared_radii(samples, neighbours), _squared_radii(real, neighbours)
    covered_samples = 0
    covered_real = torch.zeros(len(real), dtype=torch.bool, device=device)
    for rows in _blocks(len(samples), len(real)):
        distances = _squared_distances(samples[rows], real)
        covered_samples += (distances <= radius_of_real).any(dim=1).sum().item()
        covered_real |= (distances <= radius_of_samples[rows, None]).any(dim=0)
    return covered_samples / len(samples), covered_real.double().mean().item()


def _squared_radii(members, neighbours):
    """Squared distance of each member [M, D] to its k-th nearest other member, [M]."""
    radii = []
    for rows in _blocks(len(members), len(members)):
        distances = _squared_distances(members[rows], members)
        distances[:, rows].fill_diagonal_(torch.inf)  # a member is not its own neighbour
        radii.append(distances.topk(neighbours, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _squared_distances(a, b):
    """[n, m] from [n, D] and [m, D]."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").square_()


def _blocks(rows, columns):
    step = max(1, BLOCK // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
