import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import build_dataset
from experiments.lib.image_folders import SampleFolder
from tests.data.layouts import config
from utils.errors import UserError


def write(path, size=(10, 14), mode="RGB", seed=0):
    """An image of size (height, width) with random pixels; returns them as [H, W, 3]."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return np.array(image.convert("RGB"))


def check_refused(match, *arguments):
    with pytest.raises(UserError, match=match) as caught:
        SampleFolder(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(16, 16), (9, 31)])
def test_items_are_the_pixels_in_order_of_name(tmp_path, size):
    written = {name: write(tmp_path / name, size, seed=place)
               for place, name in enumerate(["00002.png", "00000.png", "00010.png", "00001.png"])}
    samples = SampleFolder(tmp_path)
    assert len(samples) == 4 and samples.size == size
    for place, name in enumerate(sorted(written)):
        assert samples[place].dtype == torch.uint8
        np.testing.assert_array_equal(samples[place].permute(1, 2, 0).numpy(), written[name])


def test_the_first_images_by_name(tmp_path):
    for place in range(5):
        write(tmp_path / f"{place:05d}.png")
    assert [path.name for path in SampleFolder(tmp_path, 2).files] == ["00000.png", "00001.png"]
    assert len(SampleFolder(tmp_path, 5)) == 5
    assert len(SampleFolder(tmp_path, 6)) == 5


def test_folders_below_are_read_and_other_files_passed_over(tmp_path):
    write(tmp_path / "00000" / "00000.png")
    write(tmp_path / "00001.JPG")
    write(tmp_path / ".hidden.png", size=(3, 3))
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / ".00002.png.tmp").write_bytes(b"half")
    assert len(SampleFolder(tmp_path)) == 2


def test_folders_of_a_script_are_not_mixed(tmp_path):
    for name in ("originals", "reconstructions"):
        write(tmp_path / name / "00000.png")
        (tmp_path / name / "settings.json").write_text("{}")
    check_refused("mixes the images of .*originals and .*reconstructions", tmp_path)
    assert len(SampleFolder(tmp_path / "originals")) == 1


def test_samples_and_real_images_are_read_alike(tmp_path):
    """A folder has the distance 0 to itself, whatever its files are."""
    turned = Image.Exif()
    turned[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    real = [image for train in (True, False) for image in build_dataset(config("folder", tmp_path, 12), train)]
    assert all(torch.equal(*pair) for pair in zip(SampleFolder(tmp_path), real, strict=True))


def test_what_is_not_a_folder_of_images(tmp_path):
    check_refused("is not a folder", tmp_path / "nowhere")
    check_refused("has no images; expected files like 00000.png", tmp_path)
    (tmp_path / "file").write_text("")
    check_refused("is not a folder", tmp_path / "file")


def test_mixed_sizes(tmp_path):
    write(tmp_path / "0.png", (10, 14))
    write(tmp_path / "1.png", (14, 10))
    check_refused("different sizes, 0.png of 10x14 and 1.png of 14x10", tmp_path)
    assert len(SampleFolder(tmp_path, 1)) == 1
