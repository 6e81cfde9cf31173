"""Scores of each class: samples against real images of their class, and a classifier by colour (docs/conditions.md)."""

import copy

import torch

from data.datasets.base import spread
from experiments.metrics.fid import MIN_IMAGES, compare
from utils import distributed
from utils.errors import UserError

BINS = 16  # of a histogram, per channel
MOST = 4096  # images that mean histograms are computed from


def by_class(samples, real):
    """{class: (samples of it, real images of it)} for the classes of a SampleFolder.

    real    data sets with classes, which together are the real images
    The class of a sample is that it was made with or, for images from elsewhere, the folder that it lies in. UserError
    if the data set does not have the class, or either side has too few images of it.
    """
    if real[0].conditions is None or real[0].conditions.kind != "class":
        raise UserError("--per_condition needs real images with classes; set data.condition=class")
    made, names, found = samples.settings.get("classes"), real[0].conditions.names, {}
    for path in samples.files:
        name = made[int(path.stem) % len(made)] if made else path.parent.relative_to(samples.folder).as_posix()
        found.setdefault(name, []).append(path)
    parts = {}
    for name, files in sorted(found.items()):
        if name not in names:
            raise UserError(f"--per_condition: the class {name!r} of samples is none of {', '.join(names)}, those of "
                            "the real images")
        part = copy.copy(samples)
        part.files = files
        parts[name] = part, [one.of_class(names.index(name)) for one in real]
        fewest = min(len(files), sum(map(len, parts[name][1])))
        if fewest < MIN_IMAGES:
            raise UserError(f"--per_condition: the class {name!r} has {fewest} samples or real images; at least "
                            f"{MIN_IMAGES} are needed")
    return parts


def compare_classes(parts, *arguments):
    """{class: scores} for the result of by_class; arguments of experiments.metrics.fid.compare. False on ranks but the
    main one."""
    found = {name: compare(*pair, *arguments) for name, pair in parts.items()}
    keys = "frechet", "kid", "kid_standard_error", "precision", "recall", "count_a", "count_b"
    return distributed.is_main() and {name: {key: scores[key] for key in keys} for name, scores in found.items()}


def histograms(images):
    """Share of the pixels in each of BINS ranges of value, per channel: float32 [N, C · BINS] of uint8 [C, H, W]."""
    return torch.stack([torch.cat([torch.bincount(channel.flatten().long() * BINS // 256, minlength=BINS)
                                   for channel in image]) / image[0].numel() for image in images])


def named_by_colour(parts, train_set, heldout):
    """{"samples", "heldout"}: shares of the samples in a result of by_class, and of the held-out images, whose class
    has the nearest (L1) of the mean histograms of the training images of each class."""
    items = spread(len(train_set), MOST)
    known, of = histograms(train_set[item] for item in items), train_set.condition_values[items]
    means = torch.stack([known[of == place].mean(0) for place in of.unique().tolist()])
    names = [train_set.conditions.names[place] for place in of.unique().tolist()]

    def share(images, classes):
        nearest = torch.cdist(histograms(images), means, p=1).argmin(1).tolist()
        return sum(names[place] == name for place, name in zip(nearest, classes, strict=True)) / len(nearest)

    pairs = [(image, name) for name, (part, _) in parts.items() for image in part]
    own = [heldout.conditions.names[place] for place in heldout.condition_values.tolist()]
    return {"samples": share(*zip(*pairs, strict=True)), "heldout": share(heldout, own)}


def describe_classes(record):
    """Lines on the scores of each class in a record of calculate_fid.py; none without --per_condition."""
    for name, scores in record.get("per_condition", {}).items():
        yield (f"{name}: {record['score']} {scores['frechet']:.2f} ({scores['count_a']} samples, {scores['count_b']} "
               f"real images) · KID {scores['kid']:.4f} · precision {scores['precision']:.3f} · recall "
               f"{scores['recall']:.3f}")
    if "named_by_colour" in record:
        yield ("the nearest mean colour histogram names the class of {samples:.1%} of the samples and of {heldout:.1%} "
               "of the held-out images".format(**record["named_by_colour"]))
