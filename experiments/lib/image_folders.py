"""A folder of generated images that can be continued: 00000.png, 00001.png, … and how they were made.

A folder of image files, as the scripts write it, as a sequence of uint8 tensors.

Images that an application starts from, in memory: the first held-out ones of a config, or all of a folder.
"""

import functools
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.datasets import build_dataset
from data.datasets.folder import Folder
from data.images import UNREADABLE, to_mode, to_tensor
from utils import distributed
from utils.checkpoint import digest
from utils.cores import warn_of_busy_cores
from utils.errors import UserError
from utils.files import read_json, replacing
from utils.images import read_image, save_png, to_uint8

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"


class ImageFolder:
    """`total` images in `path`, made with `settings` (plain data, kept in settings.json).

    output    the folder that --output stands for, where `path` is one of several in it
    UserError where the folder already holds images made with other settings, or cannot be written.
    Several processes share the work; the main one keeps the record.
    """

    def __init__(self, path, total, settings, output=None):
        self.path, self.total, self.settings = Path(path), total, settings
        self.output = output or path
        self._record = self.path / "settings.json"
        if distributed.is_main():  # the others wait for it where the work is divided
            self._open(settings)

    def file(self, index):
        return self.path / f"{index:05d}.png"

    def missing_batches(self, batch_size, evaluations=1):
        """Yield (at most batch_size indices of images that are not there yet, progress), under a progress bar.

        progress    to be called with 1 after each of the `evaluations` that a batch takes
        Each of several processes gets another batch when it asks, and none goes on before all images are there.
        """
        missing = distributed.from_main(
            lambda: [index for index in range(self.total) if not self.file(index).exists()])
        if missing:
            warn_of_busy_cores()
        batch_size = min(batch_size, -(-len(missing) // distributed.world_size())) or 1  # work for everyone
        main = distributed.is_main()
        with tqdm(total=self.total, initial=self.total - len(missing), unit="image", desc=str(self.path),
                  bar_format=BAR, disable=not main) as bar:
            for start in distributed.deal(range(0, len(missing), batch_size)):
                indices = missing[start:start + batch_size]
                started = time.monotonic()
                yield indices, functools.partial(_advance, bar, len(indices) / evaluations * distributed.world_size())
                if main:
                    self.settings["seconds"] = round(self.settings["seconds"] + time.monotonic() - started, 2)
                    self._write()
        distributed.barrier()

    def save(self, indices, images):
        """Write float images [B, C, H, W] in [−1, 1] as 8-bit PNGs under their indices."""
        for index, image in zip(indices, to_uint8(images), strict=True):
            save_png(image, self.file(index))

    def load(self):
        """All images, float32 [N, C, H, W] in [−1, 1]."""
        return torch.stack([read_image(self.file(index)) for index in range(self.total)]) / 127.5 - 1

    def _open(self, settings):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output={self.output} cannot be written ({error.strerror}); "
                            "choose another folder") from error
        has_images = any(self.path.glob("*.png"))
        saved = self._read() if has_images else {}
        for name, value in settings.items():
            if name in saved and saved[name] != value:
                raise UserError(f"--output={self.output} holds images made with {name}={saved[name]!r}, not {value!r}; "
                                "choose another folder, or remove this one")
        if has_images and not saved:
            raise UserError(f"--output={self.output} holds images of unknown origin; choose another folder")
        self.settings = {**settings, "seconds": saved.get("seconds", 0.0)}
        self._write()

    def _read(self):
        try:
            return json.loads(self._record.read_text())
        except FileNotFoundError:
            return {}
        except json.JSONDecodeError as error:
            raise UserError(f"{self._record} is not readable ({error}); remove the folder and sample again") from error

    def _write(self):
        with replacing(self._record) as temporary:
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n")


def _advance(bar, images, evaluations):
    bar.update(min(images * evaluations, bar.total - bar.n))  # of several processes the others' part is a guess


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EIGHT_BIT_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
# What Pillow raises for a file which is no image, is cut short, or is a decompression bomb.


class SampleFolder:
    """The first `count` images of a folder and the folders below it, in order of name; all of them without count.

    Item i is the uint8 tensor [3, H, W] of image i; size is the (H, W) they share, and settings how a script of this
    project made them ({} for other folders).
    Raises UserError where the folder is missing, holds fewer images than count, or images of more than one size
    (only headers are read for that), and, when an item is read, for a file whose pixels are damaged.
    """

    def __init__(self, folder, count=None):
        self.folder = folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"samples={str(folder)!r} is not a folder; give the folder with the images to score")
        files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        self.files = sorted(path for path in files if not path.name.startswith("."))
        if not self.files:
            raise UserError(f"samples={str(folder)!r} has no images; expected files like 00000.png")
        if count is not None and len(self.files) < count:
            raise UserError(f"num_samples={count} but samples={str(folder)!r} has only {len(self.files)} images; "
                            "make more or lower num_samples")
        self.files = self.files[:count]
        self.size = _size(self.files[0])
        for path in self.files:
            size = _size(path)
            if size != self.size:
                raise UserError(f"samples={str(folder)!r} has images of different sizes, {self.files[0].name} of "
                                f"{self.size[0]}x{self.size[1]} and {path.name} of {size[0]}x{size[1]}; "
                                "keep one size per folder")

    @property
    def settings(self):
        """settings.json of the folder (experiments.lib.image_folders.ImageFolder)."""
        return read_json(self.folder / "settings.json")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, place):
        try:
            with Image.open(self.files[place]) as image:
                pixels = np.array(image.convert("RGB"))
        except UNREADABLE as error:
            raise _damaged(self.files[place], error) from error
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _size(path):
    try:
        with Image.open(path) as image:
            if image.mode not in EIGHT_BIT_MODES:
                raise UserError(f"image {str(path)!r} has pixels of mode {image.mode}; 8-bit grey or RGB is needed")
            return image.height, image.width
    except UserError:
        raise
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def _damaged(path, error):
    return UserError(f"image {str(path)!r} can't be read ({error}); make it again or delete it")


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
