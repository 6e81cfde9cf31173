"""A folder of generated images that can be continued: 00000.png, 00001.png, … and how they were made."""

import functools
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from utils import distributed
from utils.cores import warn_of_busy_cores
from utils.errors import UserError
from utils.files import replacing
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
