"""The embedded photographs: enough windows, and none that shares a pixel with the other part."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import build_dataset
from data.datasets.photos import LARGEST, PHOTOS, SIDES, _path, windows
from data.images import fit, to_tensor
from tests.data.layouts import config
from utils.errors import UserError


def coverage(train):
    """How many windows of a part each pixel of each photograph is in."""
    found = {}
    for name, _ in PHOTOS:
        with Image.open(_path(name)) as photo:
            found[name] = np.zeros((photo.height, photo.width), dtype=int)
    for name, left, top, side in windows(train):
        assert left >= 0 and top >= 0
        assert top + side <= found[name].shape[0] and left + side <= found[name].shape[1]
        found[name][top:top + side, left:left + side] += 1
    return found


def test_no_pixel_is_in_a_training_and_in_a_held_out_window():
    train, held_out = coverage(True), coverage(False)
    for name, _ in PHOTOS:
        assert not ((train[name] > 0) & (held_out[name] > 0)).any()
        assert ((train[name] > 0) | (held_out[name] > 0)).mean() > 0.7  # and little of a photograph goes unused


def test_windows_are_many_distinct_and_large():
    train, held_out = windows(True), windows(False)
    assert len(set(train)) == len(train) >= 2000 and len(set(held_out)) == len(held_out) >= 256
    assert min(side for *_, side in train + held_out) >= SIDES[0]
    for part in (train, held_out):
        per_photo = np.unique([name for name, *_ in part[:60]], return_counts=True)[1]
        assert per_photo.tolist() == [10] * len(PHOTOS)  # the first few, which are the ones shown, are a fair sample


def test_held_out_pixels_cannot_change_a_training_item(monkeypatch):
    from data.datasets import photos
    dataset = build_dataset(config("photos"), True)
    before = torch.stack([dataset[i] for i in range(60)])
    original = photos._photo
    held_out = coverage(False)

    def spoiled(name, channels):
        pixels = np.array(original(name, channels))
        pixels[held_out[name] > 0] = 255 - pixels[held_out[name] > 0]
        return Image.fromarray(pixels)

    monkeypatch.setattr(photos, "_photo", spoiled)
    after = build_dataset(config("photos"), True)
    assert torch.equal(before, torch.stack([after[i] for i in range(60)]))


@pytest.mark.parametrize("size", [8, 32, (33, 47), (20, 64), SIDES[0], (40, 100), LARGEST])
def test_an_item_is_its_window_at_any_size(size):
    dataset = build_dataset(config("photos"), False, size)
    height, width = (size, size) if isinstance(size, int) else size
    for i in (0, 1):
        name, left, top, side = dataset.keys[i]
        with Image.open(_path(name)) as photo:
            window = photo.convert("RGB").crop((left, top, left + side, top + side))
        assert dataset[i].shape == (3, height, width) and dataset.source_size(i) == (side, side)
        assert side >= max(height, width)
        assert torch.equal(dataset[i], to_tensor(fit(window, (height, width))))


def test_windows_are_never_enlarged():
    for size in (LARGEST + 1, (16, LARGEST + 1)):
        with pytest.raises(UserError, match="use at most 128"):
            build_dataset(config("photos"), True, size)


@pytest.mark.parametrize("train", [True, False])
def test_a_larger_size_leaves_windows_that_hold_it_of_every_photograph(train):
    assert windows(train, 16) == windows(train, SIDES[0]) == windows(train)
    for size, least in ((SIDES[1], 384), (LARGEST, 100)):
        found = windows(train, size)
        assert len(set(found)) == len(found) >= least and min(side for *_, side in found) >= size
        assert len({name for name, *_ in found[:len(PHOTOS)]}) == len(PHOTOS)


def test_items_stay_the_same_when_a_caller_changes_one():
    dataset = build_dataset(config("photos"), False)
    first = dataset[0].clone()
    dataset[0].zero_()
    assert torch.equal(dataset[0], first)


def test_parts_and_sizes_have_their_own_fingerprints():
    keys = {build_dataset(config("photos"), train, size).fingerprint() for train in (True, False) for size in (16, 32)}
    assert len(keys) == 4


def test_a_missing_photograph_is_reported(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        build_dataset(config("photos"), True)
