"""Folders of images: `ImageFolder` writes one and can continue it, `SampleFolder` reads one.

The images of a folder, or the held-out ones of a config, also serve as inputs of the applications.
"""

import functools
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.datasets import build_dataset, log_images, reading
from data.images import SUFFIXES, UNREADABLE, in_words, list_images, read_header, read_image
from data.loader import to_float
from utils import distributed
from utils.checkpoint import digest
from utils.errors import UserError
from utils.files import check_writable, read_json, replacing, write_json
from utils.images import save_png, to_uint8

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"

PNG_THREADS = 8


class ImageFolder:
    """`total` images 00000.png, 00001.png, … in `path`, and their `settings` (plain data) in settings.json.

    output    value of --output, for messages, if `path` is one of several folders in it
    arrays    write 00000.npy, … as well
    Raises UserError if the folder holds images made with other settings, or cannot be written.
    Several ranks share the work; the main one keeps the record.
    """

    def __init__(self, path, total, settings, output=None, arrays=False):
        self.path, self.total, self.settings, self.arrays = Path(path), total, settings, arrays
        self.output = output or path
        self._record = self.path / "settings.json"
        if distributed.is_main():  # the others wait for it in missing_batches
            self._open(settings)

    def file(self, index):
        """Path of image `index`."""
        return self.path / f"{index:05d}.png"

    def missing_batches(self, batch_size, evaluations=1, along=()):
        """Yield (at most batch_size indices of missing or damaged images, progress), under a progress bar.

        progress    to be called with 1 after each of the `evaluations` of a batch
        along       ImageFolders that are filled in the same loop; an image that is missing there is made again, too
        Every rank gets another batch when it asks, and none continues before all images are there.
        """
        missing = distributed.from_main(
            lambda: [index for index in range(self.total)
                     if not all(folder.holds(index) for folder in (self, *along))])
        batch_size = min(batch_size, -(-len(missing) // distributed.world_size())) or 1  # work for every rank
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

    def save(self, indices, images, arrays=None):
        """Write float images [B, C, H, W] in [−1, 1] as 8-bit PNGs under their indices.

        arrays   float [B, C, H, W] for the .npy files, which are float32; None: the images
        Raises FloatingPointError for a value that is not finite, which would become a black pixel.
        """
        if not images.isfinite().all():
            raise FloatingPointError(f"{self.path}: images {indices[0]} to {indices[-1]} have values that are not "
                                     "finite; sample with train.precision=fp32")

        def write(index, image, array):
            if self.arrays:
                with replacing(self.file(index).with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
                    np.save(file, array.float().cpu().numpy())
            save_png(image, self.file(index))

        with ThreadPoolExecutor(PNG_THREADS) as pool:  # compressing 256² pixels takes 20 ms, without Python's lock
            list(pool.map(write, indices, to_uint8(images), images if arrays is None else arrays))

    def holds(self, index):
        """True if all files of image `index` are there, and the PNG is undamaged."""
        file = self.file(index)
        return _is_whole(file) and (not self.arrays or file.with_suffix(".npy").exists())

    def load(self):
        """All images, float32 [N, C, H, W] in [−1, 1]."""
        return to_float(torch.stack([read_image(self.file(index)) for index in range(self.total)]))

    def _open(self, settings):
        check_writable(self.path, f"--output={self.output}")
        self.path.mkdir(parents=True, exist_ok=True)
        has_images = any(self.path.glob("*.png"))
        saved = read_json(self._record) if has_images else {}
        for name, value in settings.items():
            if name in saved and saved[name] != value:
                raise UserError(f"--output={self.output} holds images made with {name}={saved[name]!r}, not {value!r}; "
                                "choose another folder, or remove this one")
        if has_images and not saved:
            raise UserError(f"--output={self.output} holds images of unknown origin; choose another folder")
        self.settings = {**settings, "seconds": saved.get("seconds", 0.0)}
        self._write()

    def _write(self):
        write_json(self._record, self.settings)


def _is_whole(path):
    """True if the PNG file is there and the checksums of its parts are right, which takes 0.1 ms per 256² image."""
    try:
        with Image.open(path) as image:
            image.verify()
    except UNREADABLE:
        return False
    return True


def _advance(bar, images, evaluations):
    bar.update(min(images * evaluations, bar.total - bar.n))  # the progress of other ranks is an estimate


class SampleFolder:
    """The first `count` images of a folder and the folders below it, by relative path; all of them without count.

    flag      name of the flag that gave the folder, for messages
    channels  as data.images.read_image
    reading   further arguments of data.images.read_image
    Item i is the uint8 tensor [C, H, W] of image i. `size` is the (H, W) that the images share, and `settings` how a
    script of this project made them ({} for other folders).
    Raises UserError if the folder is missing or empty, or the images differ in size (only headers are read for that),
    and, when an item is read, if its pixels are damaged.
    """

    def __init__(self, folder, count=None, flag="samples", channels=3, **reading):
        self.folder, self.flag = Path(folder), flag
        self.reading = {"channels": channels, **reading}
        if not self.folder.is_dir():
            raise UserError(f"--{flag}={folder} is not a folder; give a folder of images")
        paths, self._left_out = list_images(folder)
        self.files = [self.folder / path for path in paths[:count]]
        if not self.files:
            raise UserError(f"--{flag}={folder} has no images; expected files like 00000.png ({' '.join(SUFFIXES)})")
        self._check_one_origin()
        self.size = self._size_of(self.files[0])
        for path in self.files:
            size = self._size_of(path)
            if size != self.size:
                raise UserError(f"--{flag}={folder} has images of different sizes, {self.files[0].name} of "
                                f"{self.size[0]}x{self.size[1]} and {path.name} of {size[0]}x{size[1]}; "
                                "keep one size per folder")

    def _check_one_origin(self):
        """UserError if an `ImageFolder` below is mixed with other images, as originals and reconstructions would be."""
        parents = sorted({path.parent for path in self.files})
        if len(parents) > 1 and any((parent / "settings.json").exists() for parent in parents if parent != self.folder):
            raise UserError(f"--{self.flag}={self.folder} mixes the images of {parents[0]} and {parents[1]}, made by a "
                            "script in different ways; give one of these folders")

    def describe(self):
        """One line: how many images, from where."""
        return f"{self.flag}: {len(self)} images of {self.size[0]}x{self.size[1]}, {self.folder}"

    def notes(self):
        """A line about files that are left out."""
        left_out = self._left_out - Counter({".json files": 1})  # settings.json
        return [f"left out: {in_words(left_out)}"] if left_out else []

    @property
    def settings(self):
        """settings.json of the folder, written by an `ImageFolder`."""
        return read_json(self.folder / "settings.json")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self._read(functools.partial(read_image, **self.reading), self.files[index])

    def _size_of(self, path):
        return self._read(read_header, path)[0]

    def _read(self, read, path):
        try:
            return read(path)
        except UNREADABLE as error:
            raise UserError(f"image {str(path)!r} can't be read ({error}); make it again or delete it") from error


def folder_images(config, folder, count):
    """(uint8 [N, C, H, W], their origin as plain data): at most `count` images of a folder, the value of --input.

    Raises UserError if they cannot be read as a `SampleFolder`, or have fewer pixels than the model has neighbours.
    """
    found = SampleFolder(folder, count, "input", config.data.channels, **reading(config.data))
    height, width = found.size
    if height * width < config.model.knn_neighbours:
        raise UserError(f"--input={folder} has images of {height}x{width}, fewer pixels than model.knn_neighbours="
                        f"{config.model.knn_neighbours}; give larger ones")
    log_images(found)
    images = torch.stack(list(found))
    return images, {"input": str(folder), "data": digest({"images": images})}


def heldout_images(config, size, count, autoencoder=None, only=None):
    """(uint8 [N, C, H, W], their origin as plain data): at most `count` held-out images at `size` (H, W).

    autoencoder   a TrainedAutoencoder, which then uses their conditions
    only          name of the class of the images; None: all
    Raises UserError if the file of one has fewer pixels: enlarging it would make up details.
    """
    dataset = build_dataset(config, train=False, img_size=size)
    if only is not None and dataset.conditions:
        dataset = dataset.of_class(dataset.conditions.names.index(only))
    count = min(count, len(dataset))
    for index in range(count):
        height, width = dataset.source_size(index)
        if height < size[0] or width < size[1]:
            raise UserError(f"data.name={dataset.name!r}: {dataset.label(index)} is {height}x{width}, less than the "
                            f"{size[0]}x{size[1]} pixels asked for; lower --sample_img_size or --scale, or set "
                            "data.root_dir to larger images")
    log_images(dataset)
    images = torch.stack([dataset[index] for index in range(count)])
    if autoencoder and autoencoder.from_data:
        autoencoder.use_data(dataset, [dataset.with_condition(index)[1] for index in range(count)])
    return images, {"split": "heldout", "data": dataset.fingerprint()}
