"""Precision and recall against their definition by loops, and on sets with a known answer."""

import numpy as np
import pytest

from experiments.metrics import fid as module
from experiments.metrics.fid import precision_recall
from tests.reference import manifolds as reference


def two_sets(count_a, count_b, width, seed=0):
    """Feature vectors that partly overlap."""
    generator = np.random.default_rng(seed)
    return (generator.normal(0.4, 0.7, size=(count_a, width)).astype(np.float32),
            generator.normal(size=(count_b, width)).astype(np.float32))


@pytest.mark.parametrize("block", [1, 100, 2**24])
@pytest.mark.parametrize(("count_a", "count_b", "width", "neighbours"),
                         [(40, 60, 2, 3), (60, 41, 5, 1), (33, 33, 3, 5), (4, 9, 2, 3)])
def test_is_the_definition_however_it_is_cut(monkeypatch, block, count_a, count_b, width, neighbours):
    monkeypatch.setattr(module, "BLOCK", block)
    samples, real = two_sets(count_a, count_b, width)
    found = precision_recall(samples, real, neighbours)
    assert found == pytest.approx(reference.precision_recall(samples.tolist(), real.tolist(), neighbours), abs=1e-12)
    assert found[0] > 0 and found[1] < 1


def test_the_same_images_cover_each_other():
    samples, _ = two_sets(50, 1, 8)
    assert precision_recall(samples, samples[::-1].copy()) == (1, 1)


def test_few_modes_are_precise_and_scattered_samples_are_not():
    generator = np.random.default_rng(1)
    modes = np.repeat(np.eye(4) * 100, 50, axis=0)
    real = modes + generator.normal(size=modes.shape)
    one_mode = real[:50] + 0.01 * generator.normal(size=(50, 4))
    assert precision_recall(one_mode, real) == (1, pytest.approx(0.25, abs=0.02))
    everywhere = generator.uniform(-50, 150, size=(2000, 4))
    precision, recall = precision_recall(everywhere, real)
    assert precision < 0.1 and recall > 0.9


def test_large_features_that_lie_close_together():
    """Differences a millionth of the length of the vectors decide, as in float64."""
    samples, real = two_sets(30, 40, 3)
    found = precision_recall(1e6 + samples.astype(np.float64), 1e6 + real.astype(np.float64))
    assert found == precision_recall(samples, real)


def test_collapsed_samples_recall_nothing():
    _, real = two_sets(1, 50, 3)
    assert precision_recall(np.repeat(real[:1], 20, axis=0), real) == (1, pytest.approx(0, abs=0.02))


def test_refuses_sets_without_a_kth_neighbour():
    samples, real = two_sets(4, 3, 2)
    with pytest.raises(ValueError, match="neighbours=3 needs more than 3 images on either side, got 3"):
        precision_recall(samples, real)
    with pytest.raises(ValueError, match="neighbours=0 must be at least 1"):
        precision_recall(samples, real, neighbours=0)
