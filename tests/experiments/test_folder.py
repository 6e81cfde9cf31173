"""Folders of samples: continued, never mixed, never half an image."""

import json

import pytest
import torch

from data.images import read_image
from experiments.lib.image_folders import ImageFolder
from utils.errors import UserError


def fill(folder, stop_after=None, batch_size=2):
    """Write every missing image (all of value index / 10); returns the batches of indices."""
    batches = []
    for indices, progress in folder.missing_batches(batch_size, evaluations=2):
        batches.append(indices)
        progress(1), progress(1)
        folder.save(indices, torch.tensor(indices).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 10)
        if stop_after and len(batches) == stop_after:
            break
    return batches


def test_what_is_missing_is_made_and_nothing_else(tmp_path):
    assert fill(ImageFolder(tmp_path, 5, {"size": 4}), stop_after=1) == [[0, 1]]
    (tmp_path / "00000.png").unlink()
    assert fill(ImageFolder(tmp_path, 5, {"size": 4})) == [[0, 2], [3, 4]]
    assert fill(ImageFolder(tmp_path, 7, {"size": 4})) == [[5, 6]]
    assert (read_image(tmp_path / "00004.png") == round(127.5 * 1.4)).all()


@pytest.mark.parametrize("damage", [lambda png: b"", lambda png: png[:30], lambda png: png[:-20],
                                    lambda png: png[:45] + bytes([png[45] ^ 1]) + png[46:]])
def test_truncated_and_changed_images_are_made_again(tmp_path, damage):
    fill(ImageFolder(tmp_path, 3, {}))
    whole = (tmp_path / "00001.png").read_bytes()
    (tmp_path / "00001.png").write_bytes(damage(whole))
    assert fill(ImageFolder(tmp_path, 3, {})) == [[1]]
    assert (tmp_path / "00001.png").read_bytes() == whole


def test_values_that_are_not_finite_do_not_become_black_pixels(tmp_path):
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="images 0 to 1 have values that are not finite"):
        ImageFolder(tmp_path, 2, {}).save([0, 1], images)
    assert not list(tmp_path.glob("*.png"))


def test_what_is_missing_in_a_folder_filled_along_is_made_again(tmp_path):
    folders = [ImageFolder(tmp_path / name, 4, {}) for name in "ab"]
    for folder in folders:
        fill(folder)
    folders[1].file(2).unlink()
    assert [indices for indices, _ in folders[0].missing_batches(4, along=folders)] == [[2]]


def test_all_images_come_back_as_floats(tmp_path):
    folder = ImageFolder(tmp_path, 3, {})
    fill(folder)
    torch.testing.assert_close(folder.load()[:, 0, 0, 0], torch.tensor([0.0, 0.1, 0.2]), atol=0.005, rtol=0)


def test_other_settings_are_refused_and_named(tmp_path):
    fill(ImageFolder(tmp_path, 1, {"steps": 5, "size": [4, 4]}))
    with pytest.raises(UserError, match=r"made with steps=5, not 6"):
        ImageFolder(tmp_path, 1, {"steps": 6, "size": [4, 4]})
    ImageFolder(tmp_path, 1, {"steps": 5, "size": [4, 4]})


def test_a_part_of_the_output_is_refused_in_the_name_of_all_of_it(tmp_path):
    fill(ImageFolder(tmp_path / "part", 1, {"steps": 5}, tmp_path))
    with pytest.raises(UserError, match=rf"^--output={tmp_path} holds images made with steps=5"):
        ImageFolder(tmp_path / "part", 1, {"steps": 6}, tmp_path)


def test_a_folder_without_images_takes_any_settings(tmp_path):
    ImageFolder(tmp_path, 1, {"steps": 5})
    ImageFolder(tmp_path, 1, {"steps": 6})
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 6


def test_images_of_unknown_origin_and_a_broken_record_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "00000.png").write_bytes(b"")
    with pytest.raises(UserError, match="unknown origin"):
        ImageFolder(tmp_path / "a", 1, {})
    fill(ImageFolder(tmp_path / "b", 1, {}))
    (tmp_path / "b" / "settings.json").write_text("{")
    with pytest.raises(UserError, match="unknown origin"):
        ImageFolder(tmp_path / "b", 1, {})


def test_time_adds_up_over_runs(tmp_path):
    fill(ImageFolder(tmp_path, 4, {}), stop_after=1)
    (tmp_path / "settings.json").write_text('{"seconds": 100.0}')
    fill(ImageFolder(tmp_path, 4, {}))
    assert json.loads((tmp_path / "settings.json").read_text())["seconds"] >= 100.0
