"""The training set of the latent model: every image in all its orientations, encoded once and cached on disk."""

import hashlib
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data.loader import all_batches
from utils import distributed
from utils.checkpoint import digest, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.shutdown import Stopped, StopRequest, exit_code

SAVE_SECONDS = 60  # between two writes of the latents encoded so far


@dataclass
class Latents:
    """Standardised latents float32 [N, Z], and mean and std [Z] of the training latents; z · std + mean undoes it.

    The conditions are those of the images, int64 [N] or float32 [N, D]; None if they have none.
    docs/method.md, 4.8.
    """

    train: torch.Tensor
    heldout: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    train_condition: torch.Tensor | None
    heldout_condition: torch.Tensor | None


def latents_key(encoder, dtype, *datasets):
    """Hexadecimal digest of all that latents depend on: the weights, the arithmetic and the data."""
    parts = [digest(encoder.state_dict()), str(dtype), *(dataset.fingerprint() for dataset in datasets)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def load_latents(path, key, encode, train_set, heldout_set, batch_size, device, num_workers=0):
    """Latents of both sets in all `orientations` of the data set.

    They come from the cache at `path` if it was written under `key` (of latents_key); otherwise every rank encodes a
    part of them. encode maps images [B, C, H, W] to latents [B, Z].
    A killed run continues from the latents that it had saved. On a signal to stop, they are saved and Stopped is
    raised.
    """
    saved = _read(path, key)
    if distributed.any_rank(saved is None):
        saved = {"kind": "latents", "key": key}
        with StopRequest() as request:
            part = _Part(path, f"{key} {batch_size}", request)
            for name, dataset in (("train", train_set), ("heldout", heldout_set)):
                saved[name], saved[f"{name} condition"] = _encode_all(encode, dataset, batch_size, device, num_workers,
                                                                      name, part)
            if distributed.is_main():
                save_checkpoint(path, saved)
                part.remove()
            part.check()
    mean = saved["train"].mean(0)
    std = saved["train"].std(0).clamp_min(1e-6)  # an unused dimension stays zero
    return Latents((saved["train"] - mean) / std, (saved["heldout"] - mean) / std, mean, std,
                   saved.get("train condition"), saved.get("heldout condition"))


class _Part:
    """The latents that this rank has encoded so far, {pass over a data set: [latents of a batch, ...]}, on disk."""

    def __init__(self, path, key, request):
        self.whole, self.key, self.request = path, key, request
        self.path = path.with_name(f"{path.stem}.{distributed.rank()}_of_{distributed.world_size()}.pt")
        saved = _read(self.path, key)
        self.done, self.time = saved["done"] if saved else {}, time.monotonic()

    def batches(self, name):
        """The list of a pass, for the caller to append to."""
        return self.done.setdefault(name, [])

    def keep(self):
        """Call after every batch."""
        if self.request.signal or time.monotonic() - self.time >= SAVE_SECONDS:
            save_checkpoint(self.path, {"kind": "latents", "key": self.key, "done": self.done})
            self.time = time.monotonic()
        self.check()

    def check(self):
        """Raise Stopped if a signal has arrived."""
        if self.request.signal:
            raise Stopped(f"stopped by {self.request.signal.name} while encoding images; the latents so far are "
                          "saved, the same command continues", exit_code(self.request.signal))

    def remove(self):
        """Delete the parts of all ranks, once the cache is written."""
        for path in self.whole.parent.glob(f"{self.whole.stem}.*_of_*.pt"):
            path.unlink()


def _read(path, key):
    try:
        saved = load_checkpoint(path, "latents")
    except UserError:  # missing or damaged: it is only a cache
        return None
    return saved if saved["key"] == key else None


def _encode_all(encode, dataset, batch_size, device, num_workers, name, part):
    latents, conditions, total = [], [], len(dataset.orientations) * len(dataset)
    with tqdm(total=total, desc=f"encoding {name} images", unit="image", disable=not distributed.is_main()) as progress:
        for orientation in dataset.orientations:
            own, given = part.batches(f"{name} {orientation}"), part.batches(f"{name} {orientation} condition")
            progress.update(sum(map(len, own)) * distributed.world_size())
            for images, _, condition in all_batches(dataset, batch_size, device, num_workers, orientation, True,
                                                    len(own)):
                own.append(encode(images).float().cpu())
                if condition is not None:
                    given.append(condition.cpu().view(len(images), -1))
                progress.update(len(images) * distributed.world_size())
                part.keep()
            latents.append(distributed.concatenate(own))
            if dataset.conditions:
                conditions.append(distributed.concatenate(given))
    if not conditions:
        return torch.cat(latents), None
    conditions = torch.cat(conditions)
    return torch.cat(latents), conditions if dataset.conditions.kind == "vector" else conditions[:, 0]
