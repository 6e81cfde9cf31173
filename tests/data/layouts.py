"""Tiny data sets on disk, and configs that point to them."""

import io

import lmdb
import numpy as np
from PIL import Image

from configs.defaults import autoencoder_config


def config(name, root="", img_size=16, channels=3):
    cfg = autoencoder_config(img_size)
    cfg.data.name, cfg.data.root_dir, cfg.data.channels = name, str(root), channels
    return cfg


def picture(seed, width=20, height=20, mode="RGB"):
    """A smooth colour picture that differs from those of other seeds."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def write_folder(root, count, pattern="{:05d}.png", **kwargs):
    """`count` pictures below root; returns their relative paths."""
    names = [pattern.format(i) for i in range(count)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i, **kwargs).save(root / name)
    return names


def write_lsun(root, part, count, suffix="webp"):
    """An LMDB as LSUN distributes it."""
    root.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(root / f"church_outdoor_{part}_lmdb"), map_size=2**24) as environment, \
            environment.begin(write=True) as transaction:
        for i in range(count):
            buffer = io.BytesIO()
            picture(i, 30, 20).save(buffer, suffix, **({"lossless": True} if suffix == "webp" else {}))
            transaction.put(f"{i * 7919 % 1000:040x}".encode(), buffer.getvalue())
