"""Images that an application starts from, in memory: the first held-out ones of a config, or all of a folder."""

from pathlib import Path

import torch
from PIL import Image

from data.datasets import build_dataset
from data.datasets.folder import Folder
from data.images import UNREADABLE, to_mode, to_tensor
from utils.checkpoint import digest
from utils.errors import UserError


def heldout_images(config, size, count):
    """(uint8 [N, C, H, W], where they are from as plain data): at most `count` held-out images at `size` (H, W).

    Raises UserError where one has fewer pixels than that before it is resized: details would be made up.
    """
    dataset = build_dataset(config, train=False, img_size=size)
    count = min(count, len(dataset))
    for index in range(count):
        height, width = dataset.source_size(index)
        if height < size[0] or width < size[1]:
            raise UserError(f"data.name={dataset.name!r}: {dataset.label(index)} is {height}x{width}, less than the "
                            f"{size[0]}x{size[1]} pixels asked for; lower --sample_img_size or --scale, or set "
                            "data.root_dir to larger images")
    images = torch.stack([dataset[index] for index in range(count)])
    return images, {"split": "heldout", "data": dataset.fingerprint()}


def folder_images(flag, folder, channels, count, least=1):
    """(uint8 [N, C, H, W], where they are from as plain data): the first `count` images of a folder, by name.

    flag    name of the flag that gave the folder, for the UserError where it is missing, has none, or of two sizes
    least   model.knn_neighbours: how many pixels an image must have
    """
    found = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in Folder.suffixes)[:count]
    if not found:
        raise UserError(f"--{flag}={folder} has no images; expected files like {Folder.example}")
    images = [_read(path, channels) for path in found]
    for path, image in zip(found, images, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{name.name} of {shape[1]}x{shape[2]}" for name, shape in
                     ((found[0], images[0].shape), (path, image.shape))]
            raise UserError(f"--{flag}={folder} has images of different sizes, {' and '.join(sizes)}; keep one size "
                            "per folder")
    images = torch.stack(images)
    if images[0, 0].numel() < least:
        height, width = images.shape[-2:]
        raise UserError(f"--{flag}={folder} has images of {height}x{width}, fewer pixels than model.knn_neighbours="
                        f"{least}; give larger ones")
    return images, {"input": str(folder), "data": digest({"images": images})}


def _read(path, channels):
    try:
        with Image.open(path) as image:
            return to_tensor(to_mode(image, channels))
    except UNREADABLE as error:
        raise UserError(f"{path} can't be read ({type(error).__name__}); make it again or delete it") from error
