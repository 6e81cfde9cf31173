"""The training set of the latent model: every image and its mirror image, encoded once and kept on disk."""

import hashlib
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data.loader import all_batches
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError


@dataclass
class Latents:
    """Standardised latents float32 [N, Z], and the statistics [Z] of the training ones: z · std + mean undoes it."""

    train: torch.Tensor
    heldout: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def load_latents(path, encode, weights, train_set, heldout_set, batch_size, device, num_workers=0):
    """Latents of both sets and their mirror images, from the cache at `path` if it fits, else encoded anew.

    encode    images [B, C, H, W] -> latents [B, Z]
    weights   the encoder's state dict; with the data sets' fingerprints it makes the key of the cache
    """
    key = _key(weights, train_set, heldout_set)
    saved = _read(path, key)
    if saved is None:
        saved = {"kind": "latents", "key": key}
        for name, dataset in (("train", train_set), ("heldout", heldout_set)):
            saved[name] = _encode_all(encode, dataset, batch_size, device, num_workers, f"encoding {name} images")
        save_checkpoint(path, saved)
    mean = saved["train"].mean(0)
    std = saved["train"].std(0).clamp_min(1e-6)  # a dimension that the encoder does not use stays zero
    return Latents((saved["train"] - mean) / std, (saved["heldout"] - mean) / std, mean, std)


def _key(weights, *datasets):
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for dataset in datasets:
        digest.update(dataset.fingerprint().encode())
    return digest.hexdigest()


def _read(path, key):
    try:
        saved = load_checkpoint(path, "latents")
    except UserError:  # missing or broken: it is only a cache
        return None
    return saved if saved["key"] == key else None


def _encode_all(encode, dataset, batch_size, device, num_workers, title):
    latents = []
    with tqdm(total=2 * len(dataset), desc=title, unit="image") as progress:
        for mirrored in (False, True):
            for images, _ in all_batches(dataset, batch_size, device, num_workers, mirrored=mirrored):
                latents.append(encode(images).float().cpu())
                progress.update(len(images))
    return torch.cat(latents)
