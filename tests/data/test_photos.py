"""The embedded pictures: enough windows, and none that shares a pixel with the other part."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import build_dataset
from data.datasets.photos import Photos, Tissue
from data.images import fit, to_tensor
from tests.data.layouts import config
from utils.errors import UserError

BOTH = pytest.mark.parametrize("data", [Photos, Tissue], ids=lambda data: data.name)


def coverage(data, train):
    """{picture: number of windows of a part over each pixel}."""
    found = {}
    for name, _ in data.pictures:
        with Image.open(data.path(name)) as picture:
            found[name] = np.zeros((picture.height, picture.width), dtype=int)
    for name, left, top, side in data.windows(train):
        assert left >= 0 and top >= 0
        assert top + side <= found[name].shape[0] and left + side <= found[name].shape[1]
        found[name][top:top + side, left:left + side] += 1
    return found


@BOTH
def test_no_pixel_is_in_a_training_and_in_a_held_out_window(data, monkeypatch):
    train, held_out = coverage(data, True), coverage(data, False)
    for name, _ in data.pictures:
        assert not ((train[name] > 0) & (held_out[name] > 0)).any()
        assert ((train[name] > 0) | (held_out[name] > 0)).mean() > 0.7  # and most of a picture is used

    dataset = build_dataset(config(data.name), True)
    before = torch.stack([dataset[i] for i in range(60)])
    original = data._picture

    def spoiled(name, channels):
        pixels = np.array(original(name, channels))
        pixels[held_out[name] > 0] = 255 - pixels[held_out[name] > 0]
        return Image.fromarray(pixels)

    monkeypatch.setattr(data, "_picture", staticmethod(spoiled))
    after = build_dataset(config(data.name), True)
    assert torch.equal(before, torch.stack([after[i] for i in range(60)]))


@pytest.mark.parametrize("data, train_windows, held_out_windows", [(Photos, 6000, 384), (Tissue, 4000, 512)])
def test_windows_are_many_distinct_and_large(data, train_windows, held_out_windows):
    for train, count in ((True, train_windows), (False, held_out_windows)):
        found = data.windows(train)
        assert len(set(found)) == len(found) == count
        assert {side for *_, side in found} == set(data.sides)
        first = np.unique([name for name, *_ in found[:60]], return_counts=True)[1]
        assert set(first) == {60 // len(data.pictures)}  # the first few, which are shown, are a fair sample


@pytest.mark.parametrize("data, size", [(Photos, (33, 47)), (Photos, 64), (Photos, 128), (Tissue, 32), (Tissue, 80)])
def test_an_item_is_its_window_at_any_size(data, size):
    dataset = build_dataset(config(data.name), False, size)
    height, width = (size, size) if isinstance(size, int) else size
    for i in (0, 1):
        name, left, top, side = dataset.keys[i]
        with Image.open(data.path(name)) as picture:
            window = picture.convert("RGB").crop((left, top, left + side, top + side))
        assert dataset[i].shape == (3, height, width) and dataset.source_size(i) == (side, side)
        assert side >= max(height, width)
        assert torch.equal(dataset[i], to_tensor(fit(window, (height, width))))


@pytest.mark.parametrize("size", [129, (16, 129)])
def test_windows_are_never_enlarged(size):
    with pytest.raises(UserError, match="use at most 128"):
        build_dataset(config("photos"), True, size)


@BOTH
def test_a_larger_size_leaves_windows_that_hold_it_of_every_picture(data):
    largest = data.sides[-1]
    found = data.windows(True, largest)
    assert len(set(found)) == len(found) >= 100 and {side for *_, side in found} == {largest}
    assert len({name for name, *_ in found[:len(data.pictures)]}) == len(data.pictures)


def test_only_tissue_is_turned_and_only_by_half_turns_if_it_is_not_square():
    assert build_dataset(config("photos"), False).orientations == [(0, False), (0, True)]
    assert len(set(build_dataset(config("tissue"), False).orientations)) == 8
    assert {turn for turn, _ in build_dataset(config("tissue"), False, (16, 32)).orientations} == {0, 2}


def test_items_stay_the_same_when_a_caller_changes_one():
    dataset = build_dataset(config("photos"), False)
    first = dataset[0].clone()
    dataset[0].zero_()
    assert torch.equal(dataset[0], first)


def test_parts_and_sizes_have_their_own_fingerprints():
    keys = {build_dataset(config("tissue"), train, size).fingerprint() for train in (True, False) for size in (16, 32)}
    assert len(keys) == 4


def test_a_missing_picture_is_reported(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        Photos.path("astronaut.png")
