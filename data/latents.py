"""The training set of the latent model: every image, with its mirror image, encoded once and kept on disk."""

import hashlib
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data.loader import all_batches
from utils import distributed
from utils.checkpoint import digest, load_checkpoint, save_checkpoint
from utils.errors import UserError


@dataclass
class Latents:
    """Standardised latents float32 [N, Z], and the statistics [Z] of the training ones: z · std + mean undoes it."""

    train: torch.Tensor
    heldout: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def latents_key(encoder, dtype, *datasets):
    """Text that changes when the latents would: from the weights, the arithmetic and the data."""
    parts = [digest(encoder.state_dict()), str(dtype), *(dataset.fingerprint() for dataset in datasets)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def load_latents(path, key, encode, train_set, heldout_set, batch_size, device, num_workers=0):
    """Latents of both sets and, where a data set `flips`, their mirror images, from the cache at `path` if it has the
    key, else encoded anew, by each process a part.

    key       of latents_key
    encode    images [B, C, H, W] -> latents [B, Z]
    """
    saved = _read(path, key)
    if distributed.any_rank(saved is None):
        saved = {"kind": "latents", "key": key}
        for name, dataset in (("train", train_set), ("heldout", heldout_set)):
            saved[name] = _encode_all(encode, dataset, batch_size, device, num_workers, f"encoding {name} images")
        if distributed.is_main():
            save_checkpoint(path, saved)
    mean = saved["train"].mean(0)
    std = saved["train"].std(0).clamp_min(1e-6)  # a dimension that the encoder does not use stays zero
    return Latents((saved["train"] - mean) / std, (saved["heldout"] - mean) / std, mean, std)


def _read(path, key):
    try:
        saved = load_checkpoint(path, "latents")
    except UserError:  # missing or broken: it is only a cache
        return None
    return saved if saved["key"] == key else None


def _encode_all(encode, dataset, batch_size, device, num_workers, title):
    latents = []
    sides = (False, True) if dataset.flips else (False,)
    with tqdm(total=len(sides) * len(dataset), desc=title, unit="image", disable=not distributed.is_main()) as progress:
        for mirrored in sides:
            own = []
            for images, _ in all_batches(dataset, batch_size, device, num_workers, mirrored=mirrored, divided=True):
                own.append(encode(images).float().cpu())
                progress.update(len(images) * distributed.world_size())
            latents.append(distributed.concatenate(own))
    return torch.cat(latents)
