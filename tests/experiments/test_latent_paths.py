"""Great circles and principal directions against closed forms."""

import math

import pytest
import torch

from experiments.lib.latent_paths import along, between, principal_directions, slerp
from utils.rng import generator, randn


def draw(*shape, seed=0):
    return randn(shape, generator("cpu", seed)).double()


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 4, 5)])
def test_slerp_keeps_the_ends_and_is_symmetric(shape):
    a, b = draw(*shape), 3 * draw(*shape, seed=1)
    torch.testing.assert_close(slerp(a, b, 0), a)
    torch.testing.assert_close(slerp(a, b, 1), b)
    torch.testing.assert_close(slerp(a, b, 0.3), slerp(b, a, 0.7))


def test_slerp_keeps_a_common_norm_and_turns_at_constant_speed():
    a, b = (torch.nn.functional.normalize(draw(4, 9, seed=seed), dim=1) * 5 for seed in (0, 1))
    path = torch.stack([slerp(a, b, k / 8) for k in range(9)])
    torch.testing.assert_close(path.norm(dim=2), torch.full((9, 4), 5.0, dtype=torch.float64))
    angles = torch.acos((path[1:] * path[:-1]).sum(2) / 25)
    torch.testing.assert_close(angles, (torch.acos((a * b).sum(1) / 25) / 8).expand(8, 4))
    torch.testing.assert_close(slerp(a, b, torch.tensor([0.0, 0.125, 0.5, 1.0])),
                               torch.stack([path[0, 0], path[1, 1], path[4, 2], path[8, 3]]))


def test_parallel_vectors_are_interpolated_linearly():
    a = draw(2, 5)
    for b in (a, 2 * a, a + 1e-9):
        torch.testing.assert_close(slerp(a, b, 0.25), 0.75 * a + 0.25 * b)


def test_paths_start_and_end_at_the_points_whatever_the_centre():
    a, b, centre = draw(6), draw(6, seed=1), draw(6, seed=2)
    way = between(a, b, 5, centre)
    assert way.shape == (5, 6)
    torch.testing.assert_close(way[[0, -1]], torch.stack([a, b]))
    torch.testing.assert_close(way[2], centre + slerp((a - centre)[None], (b - centre)[None], 0.5)[0])
    assert not torch.allclose(way[2], between(a, b, 5)[2])
    z, direction = draw(6), draw(6, seed=3)
    torch.testing.assert_close(along(z, direction, 2.0, 5), torch.stack([z + k * direction for k in (-2, -1, 0, 1, 2)]))


def test_principal_directions_of_a_known_covariance():
    basis, _ = torch.linalg.qr(draw(5, 5))
    stds = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    white = draw(400, 5, seed=1)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / 400)).T  # exactly of unit covariance
    found = principal_directions(white * stds @ basis.T + 7, 3)
    torch.testing.assert_close(found.std, stds[:3].float())
    torch.testing.assert_close(found.share, (stds**2 / (stds**2).sum())[:3].float())
    torch.testing.assert_close(found.mean, torch.full((5,), 7.0))
    torch.testing.assert_close((found.directions.double() @ basis).abs(), torch.eye(3, 5, dtype=torch.float64),
                               atol=1e-6, rtol=0)
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_constant_latents_have_directions_without_variance():
    found = principal_directions(torch.ones(4, 3), 2)
    assert torch.equal(found.std, torch.zeros(2)) and math.isfinite(found.share.sum())
