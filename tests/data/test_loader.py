"""The training stream as a function of (seed, position), and one pass over everything."""

import itertools
import multiprocessing

import pytest
import torch
from torch.utils.data import Subset

from data.datasets import build_dataset
from data.loader import all_batches, map_in_workers, oriented, to_float, training_batches
from tests.data.layouts import config, write_folder
from tests.data.numbers import Numbers
from utils.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_folder(root, 12, width=10, height=8)
    return build_dataset(config("folder", root), True, (8, 10))  # 11 images


def take(count, *args, **kwargs):
    batches = list(itertools.islice(training_batches(*args, **kwargs), count))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.index for batch in batches])


def which(dataset, images):
    """(item, orientation) of each image."""
    known = {to_float(oriented(dataset[item], one)).contiguous().numpy().tobytes(): (item, one)
             for item in range(len(dataset)) for one in dataset.orientations}
    return [known[image.contiguous().numpy().tobytes()] for image in images]


def test_images_are_floats_in_minus_one_to_one(dataset):
    images, index = take(2, dataset, 4, seed=0)
    assert images.dtype == torch.float32 and images.shape == (8, 3, 8, 10)
    assert index.dtype == torch.int64 and index.tolist() == list(range(8))
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 23])
def test_the_stream_does_not_depend_on_the_batch_size(dataset, batch_size):
    images, index = take(-(-46 // batch_size), dataset, batch_size, seed=3)
    expected, _ = take(46, dataset, 1, seed=3)
    assert torch.equal(images[:46], expected) and index.tolist() == list(range(len(images)))


def test_the_stream_does_not_depend_on_the_workers(dataset, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    images, index = take(9, dataset, 4, seed=3, num_workers=2)
    expected, positions = take(9, dataset, 4, seed=3)
    assert torch.equal(images, expected) and torch.equal(index, positions)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_equals_the_unbroken_one(dataset, num_workers):
    images, index = take(12, dataset, 4, seed=5)
    late_images, late_index = take(5, dataset, 4, seed=5, start_step=7, num_workers=num_workers)
    assert torch.equal(images[28:], late_images) and torch.equal(index[28:], late_index)


def test_every_epoch_shows_each_image_once_in_its_own_order(dataset):
    epochs = [which(dataset, images) for images in take(33, dataset, 1, seed=2)[0].split(11)]
    orders = [[item for item, _ in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(11))
    assert orders != [[item for item, _ in which(dataset, images)]
                      for images in take(33, dataset, 1, seed=4)[0].split(11)]


def test_flips_are_a_fair_coin_of_epoch_and_item(dataset):
    shown = which(dataset, take(110, dataset, 4, seed=2)[0])
    flips = torch.zeros(40, 11)
    for position, (item, (_, mirrored)) in enumerate(shown):
        flips[position // 11, item] = mirrored
    assert 0.4 < flips.mean() < 0.6
    assert (flips.mean(0) > 0.15).all() and (flips.mean(0) < 0.85).all()


def test_all_turns_and_mirror_images_are_shown_equally_often():
    turned = Numbers(16, turns=(0, 1, 2, 3))
    shown = [orientation for _, orientation in which(turned, take(100, turned, 16, seed=2)[0])]
    counts = torch.tensor([shown.count(one) for one in turned.orientations])
    assert len(counts) == 8 and (counts - 200).abs().max() < 5 * (1600 * 1 / 8 * 7 / 8) ** 0.5


@pytest.mark.parametrize("orientation, expected", [
    ((0, False), [[0, 1], [2, 3]]), ((0, True), [[1, 0], [3, 2]]), ((1, False), [[1, 3], [0, 2]]),
    ((2, False), [[3, 2], [1, 0]]), ((1, True), [[3, 1], [2, 0]])])
def test_an_image_is_turned_counter_clockwise_and_then_mirrored(orientation, expected):
    assert oriented(torch.arange(4).view(1, 2, 2), orientation).tolist() == [expected]


@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
@pytest.mark.parametrize("orientation", [(0, False), (0, True)])
def test_all_batches_is_the_whole_set_once_in_order(dataset, batch_size, orientation):
    images, index, _ = zip(*all_batches(dataset, batch_size, orientation=orientation), strict=True)
    images, index = torch.cat(images), torch.cat(index)
    assert index.tolist() == list(range(11))
    assert which(dataset, images) == [(item, orientation) for item in range(11)]


def test_all_batches_with_workers_and_of_a_part(dataset, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    part = Subset(dataset, [7, 2, 5])
    images, index, _ = zip(*all_batches(part, 2, num_workers=2), strict=True)
    images, index = torch.cat(images), torch.cat(index)
    assert index.tolist() == [0, 1, 2]
    assert [item for item, _ in which(dataset, images)] == [7, 2, 5]


def test_the_global_generator_is_left_alone(dataset):
    state = torch.get_rng_state()
    take(3, dataset, 4, seed=0)
    list(all_batches(dataset, 4))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_users_mistake_comes_out_of_a_worker_as_one_line(tmp_path, num_workers, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    names = write_folder(tmp_path, 8)
    broken = build_dataset(config("folder", tmp_path), True)
    for name in names:
        (tmp_path / name).write_text("lost")
    with pytest.raises(UserError, match="^data.root_dir=.*cannot be read") as caught:
        take(1, broken, 4, seed=0, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_in_memory_sets_are_not_sent_to_workers(monkeypatch):
    monkeypatch.setattr("os.fork", lambda: pytest.fail("started a process"))
    photos = build_dataset(config("photos"), False)
    assert len(next(iter(training_batches(photos, 3, seed=0, num_workers=4))).images) == 3
    assert len(next(iter(all_batches(Subset(photos, range(5)), 3, num_workers=4)))[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_of_any_start_method(dataset, method, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        images = torch.cat([images for images, *_ in all_batches(dataset, 4, num_workers=1)])
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert torch.equal(images, torch.cat([images for images, *_ in all_batches(dataset, 4)]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_the_order_of_the_inputs(num_workers):
    endless = map_in_workers(abs, (-x for x in itertools.count()), num_workers)
    assert list(itertools.islice(endless, 20)) == list(range(20))
    assert list(map_in_workers(abs, [], num_workers)) == []
