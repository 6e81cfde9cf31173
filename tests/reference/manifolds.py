"""Precision and recall by loops over pairs, as the paper states them (Kynkäänniemi et al. 2019, eqs. 1 and 2)."""

import math


def precision_recall(samples, real, neighbours):
    """(precision, recall) of two sequences of vectors."""
    return share_covered(samples, real, neighbours), share_covered(real, samples, neighbours)


def share_covered(points, members, neighbours):
    """Share of points within the k-th nearest neighbour distance of at least one member."""
    radii = []
    for i, member in enumerate(members):
        others = sorted(math.dist(member, other) for j, other in enumerate(members) if j != i)
        radii.append(others[neighbours - 1])
    covered = 0
    for point in points:
        covered += any(math.dist(point, member) <= radius for member, radius in zip(members, radii, strict=True))
    return covered / len(points)
