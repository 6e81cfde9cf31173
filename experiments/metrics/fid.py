"""Distances between two sets of feature vectors: Fréchet (FID and its kin) and kernel (KID). NumPy only.

Statistics of real images on disk, so that a data set of 70,000 images is put through a network once.

All scores of samples against real images, in the features of one network.

What a score was computed from, in words, and where that departs from the paper's protocol.
"""

import hashlib
import logging
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import ConcatDataset

from experiments.metrics.features import PREPROCESSING_VERSION, Crops, extract
from experiments.metrics.precision_recall import precision_recall
from utils import distributed
from utils.files import replacing

MIN_IMAGES = 4  # two subsets of two, the fewest that give KID a standard error
KERNEL_FEATURES = 50_000  # how many feature vectors a Statistics keeps for KID
CHUNK = 4096  # rows turned into float64 at a time


class Statistics(NamedTuple):
    """What a score needs to know about one set of images.

    mean        float64 [D]
    covariance  float64 [D, D], unbiased (divided by count - 1)
    count       number of images behind mean and covariance
    features    float32 [n, D]: all of them or, of more than KERNEL_FEATURES, a random part; used by KID
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    features: np.ndarray


def statistics(features):
    """Statistics of a feature matrix [N, D], N >= 4. Raises ValueError for another shape and for nan or infinity."""
    features = np.asarray(features, dtype=np.float32)
    if features.ndim != 2 or len(features) < MIN_IMAGES:
        raise ValueError(f"features must be [N, D] with N >= {MIN_IMAGES}, got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold nan or infinity")
    count, width = features.shape
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((width, width))
    for start in range(0, count, CHUNK):  # in parts: 70,000 x 2048 in float64 would be another gigabyte
        centred = features[start:start + CHUNK] - mean
        covariance += centred.T @ centred
    covariance /= count - 1
    if count > KERNEL_FEATURES:
        features = features[np.random.default_rng(0).permutation(count)[:KERNEL_FEATURES]]
    return Statistics(mean, covariance, count, features)


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """Fréchet distance |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½) of two Gaussians (Heusel et al. 2017, eq. 6).

    S_a S_b has the eigenvalues of the symmetric S_a^½ S_b S_a^½, so no square root of a general matrix is needed and
    covariances without full rank (fewer images than feature dimensions) are no special case. Takes [D] and [D, D],
    computes in float64, returns a float >= 0.
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
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # zeros may come out as rounding below zero


def kernel_distance(x, y):
    """Unbiased estimate of MMD² with the kernel (u·v/D + 1)³ (Bińkowski et al. 2018), from x [n, D] and y [m, D]."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    within = [(np.sum(k) - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (_kernel(x, x), _kernel(y, y))]
    return float(sum(within) - 2 * _kernel(x, y).mean())


def _kernel(u, v):
    return (u @ v.T / u.shape[1] + 1) ** 3


def kid(features_a, features_b, subset_size=1000, seed=0):
    """Kernel inception distance and its standard error, (float, float), of feature matrices [N, D] and [M, D].

    The mean of kernel_distance over disjoint random subsets, as many as have subset_size vectors (at least one). The
    standard error is that of such a mean over ten subsets or more: where there are fewer, the same vectors are cut
    into smaller subsets for it alone, which overstates it.
    """
    fewest = min(len(features_a), len(features_b))
    if fewest < MIN_IMAGES:
        raise ValueError(f"KID needs {MIN_IMAGES} images on either side, got {len(features_a)} and {len(features_b)}")
    count = max(fewest // subset_size, 1)
    count_for_error = max(count, min(10, fewest // 2))
    largest = 2 * subset_size  # the larger set is used up to this, so that its kernel stays small
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


def score(features_a, features_b):
    """Fréchet distance and KID of two feature matrices [N, D] (or Statistics of them), as a dict of numbers.

    Keys: frechet, kid, kid_standard_error, count_a, count_b.
    """
    a, b = (given if isinstance(given, Statistics) else statistics(given) for given in (features_a, features_b))
    value, standard_error = kid(a.features, b.features)
    return {"frechet": frechet_distance(a.mean, a.covariance, b.mean, b.covariance),
            "kid": value, "kid_standard_error": standard_error, "count_a": a.count, "count_b": b.count}


UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


def cached_statistics(folder, label, key, compute):
    """The Statistics stored for `key` in `folder`, or those of compute(), which are then stored.

    label  start of the file's name, for people
    key    printable; everything the statistics depend on. Another key is another file; a file that is damaged or
           belongs to another key is written anew.
    Of several processes the main one reads and writes; all call compute(), and it is the main one's result that counts.
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
    except OSError as error:  # the score is still good
        logging.warning("statistics of the real images could not be kept in %s: %s", path, error)
    return made


def _read(path, key):
    try:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["key"]) != key:
                return None
            found = Statistics(archive["mean"], archive["covariance"], int(archive["count"]), archive["features"])
    except UNREADABLE:
        return None
    width = len(found.mean)
    if found.covariance.shape != (width, width) or found.features.shape[1:] != (width,):
        return None
    return found


def _write(path, key, statistics):
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, key=key, **statistics._asdict())


def compare(samples, real, model, cache, crops=None, crop_size=None, neighbours=3, batch_size=64, num_workers=0):
    """Dict of the numbers of metrics.score, precision and recall, and of what the real images were.

    Several processes share the work of the network; the main one gets the result, the others None.

    samples     images as uint8 [C, H, W] with their common `size` (H, W), such as a SampleFolder
    real        data sets (data.datasets.base) that together are the real images; all of one size
    model       experiments.metrics.features.FeatureModel
    cache       folder in which the statistics of the real images are kept
    crops       compare so many random crops of crop_size² pixels of either side; None: whole images, resized
    neighbours  k of precision and recall
    batch_size, num_workers   of the feature network, and processes that read and resize
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
    return {**scores, "neighbours": neighbours, "real_images": [part.describe() for part in real], **key}


PAPER = {"num_samples": 50_000, "sampler": "ddim", "steps": 100, "eta": 0.0, "feature_model": "clip_vit_b_32",
         "crops": None}
WORDS = {"num_samples": "{} samples", "sampler": "{}", "steps": "{} steps", "eta": "eta {}",
         "feature_model": "features of {}", "crops": "crops"}
UNKNOWN = "made in an unknown way"


def describe(facts):
    """One line about the protocol of facts: num_samples, size [H, W] of the samples, sampling (settings of their
    folder, {} where it has none), real_images (lines that describe them), feature_model, crops (their number or None)
    and crop_size."""
    made, (height, width), differences = facts["sampling"], facts["size"], departures(facts)
    how = f" by {made['sampler']} in {made['steps']} steps" if "sampler" in made else f", {made.get('what', UNKNOWN)}"
    cut = f"{facts['crops']} crops of {facts['crop_size']}² of each; " if facts["crops"] else ""
    return (f"{facts['num_samples']} samples of {height}x{width}{how}; {' and '.join(facts['real_images'])}; "
            f"{cut}8 bits, not flipped; features of {facts['feature_model']}; "
            + (f"not the paper's, with {', '.join(differences)}" if differences else "the paper's"))


def departures(facts):
    """Phrases for where facts (see describe) differ from 50,000 samples by 100 steps of DDIM in CLIP ViT-B/32 features.

    That samples were made in an unknown way is a difference.
    """
    unknown = {**PAPER, "sampler": facts["sampling"].get("what", "an unknown sampler")}
    found = {**unknown, **facts["sampling"], **facts}
    return [WORDS[name].format(found[name]) for name, value in PAPER.items() if found[name] != value]
