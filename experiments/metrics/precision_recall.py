"""Precision and recall of samples by nearest-neighbour manifolds (docs/method.md, 7.3; Kynkäänniemi et al. 2019)."""

import torch

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
