"""Images that an application starts from: held-out ones with as many pixels as are asked for, or those of a folder."""

import pytest
import torch

from data.datasets import build_dataset
from experiments.lib.image_folders import folder_images, heldout_images
from tests.data.layouts import config, picture, write_folder
from utils.errors import UserError


def test_heldout_images_are_those_of_the_data_set_at_the_size():
    cfg = config("photos")
    images, source = heldout_images(cfg, (96, 96), 5)
    dataset = build_dataset(cfg, train=False, img_size=96)
    assert torch.equal(images, torch.stack([dataset[i] for i in range(5)]))
    assert source == {"split": "heldout", "data": dataset.fingerprint()}
    assert len(heldout_images(cfg, (16, 16), 10_000)[0]) == len(build_dataset(cfg, train=False))


@pytest.mark.parametrize("name", ["folder", "ffhq"])
def test_truth_is_never_enlarged(tmp_path, name):
    write_folder(tmp_path, 40)  # of 20², two held out
    assert heldout_images(config(name, tmp_path), (20, 20), 4)[0].shape == (2, 3, 20, 20)
    for size in ((21, 16), (16, 21)):
        with pytest.raises(UserError, match=f"00038.png is 20x20, less than the {size[0]}x{size[1]}"):
            heldout_images(config(name, tmp_path), size, 4)


def test_a_folder_gives_its_images_in_order_as_they_are(tmp_path):
    cfg = config("folder")
    for i in (2, 0, 1):
        picture(i, 20, 14).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._0.png").write_text("what macOS leaves behind")
    images, source = folder_images(cfg, tmp_path, 16)
    assert images.shape == (3, 3, 14, 20) and images.dtype == torch.uint8
    assert torch.equal(folder_images(cfg, tmp_path, 2)[0], images[:2])
    assert folder_images(config("folder", channels=1), tmp_path, 16)[0].shape == (3, 1, 14, 20)
    picture(7, 20, 14).save(tmp_path / "1.png")
    again = folder_images(cfg, tmp_path, 16)
    assert torch.equal(again[0][0], images[0]) and not torch.equal(again[0][1], images[1])
    assert again[1]["input"] == source["input"] and again[1]["data"] != source["data"]
