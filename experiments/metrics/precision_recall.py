"""Precision and recall of samples by nearest-neighbour manifolds (Kynkäänniemi et al. 2019)."""

import torch

BLOCK = 2**24  # distances held at a time: 128 MB in float64


def precision_recall(samples, real, neighbours=3, device="cpu"):
    """(precision, recall), floats in [0, 1], of feature matrices [N, D] and [M, D].

    Precision is the share of the samples that lie in the manifold of the real images, recall the share of the real
    images in that of the samples (eqs. 1 and 2). The manifold of a set is the union of the balls about its members,
    each reaching the member's k-th nearest other one.
    neighbours   k, 1 or more
    device       where distances are computed, in float64: the differences of near vectors are what counts
    Raises ValueError where a set has no k-th neighbour.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours} must be at least 1")
    fewest = min(len(samples), len(real))
    if fewest <= neighbours:
        raise ValueError(f"neighbours={neighbours} needs more than {neighbours} images on either side, got {fewest}")
    samples, real = (torch.as_tensor(x).to(device, torch.float64) for x in (samples, real))
    reach_of_samples, reach_of_real = _reach(samples, neighbours), _reach(real, neighbours)
    covered_samples = 0
    covered_real = torch.zeros(len(real), dtype=torch.bool, device=device)
    for rows in _blocks(len(samples), len(real)):
        distances = _squared_distances(samples[rows], real)
        covered_samples += (distances <= reach_of_real).any(dim=1).sum().item()
        covered_real |= (distances <= reach_of_samples[rows, None]).any(dim=0)
    return covered_samples / len(samples), covered_real.double().mean().item()


def _reach(members, neighbours):
    """Squared distance of each member [M, D] to its k-th nearest other one, [M]."""
    reach = []
    for rows in _blocks(len(members), len(members)):
        distances = _squared_distances(members[rows], members)
        distances[:, rows].fill_diagonal_(torch.inf)  # a member is no neighbour of itself
        reach.append(distances.topk(neighbours, dim=1, largest=False).values[:, -1])
    return torch.cat(reach)


def _squared_distances(a, b):
    """[n, m] of [n, D] and [m, D]."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").square_()


def _blocks(rows, columns):
    step = max(1, BLOCK // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
