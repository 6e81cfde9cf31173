"""Random draws as a pure function of their purpose: (seed, purpose, global sample index) or (seed, purpose, step).

A sample draws the same numbers on every rank, for every split of a step, and after every interruption.
"""

import hashlib

import torch


def seed_of(*keys):
    """63-bit seed from any printable keys, for example seed_of(config.run.seed, "noise", step, index)."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device, *keys):
    """One torch.Generator on `device` for the given keys."""
    return torch.Generator(device).manual_seed(seed_of(*keys))


def sample_generators(device, indices, *keys):
    """One generator per sample: a list as long as `indices`, each a function of (keys, its global index) alone."""
    return [generator(device, *keys, int(index)) for index in indices]


def draw_seed(generator, device=None):
    """Seed of a second stream, drawn from the first: int64, a scalar, or [B] for a list of B generators."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([draw_seed(one, device) for one in generator])
    return torch.randint(2**63 - 1, (), generator=generator, device=device)


def seeded(seed):
    """The stream of draw_seed: a new generator, or a list of B. Waits for a GPU, because the host seeds generators."""
    if seed.dim():
        return [torch.Generator(seed.device).manual_seed(one) for one in seed.tolist()]
    return torch.Generator(seed.device).manual_seed(seed.item())


def _draw(make, shape, generator, device):
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}; one per sample is needed")
        return torch.stack([make(shape[1:], generator=one, device=device) for one in generator])
    return make(shape, generator=generator, device=device)


def rand(shape, generator=None, device=None):
    """Uniform [0, 1) float32 of `shape` [B, ...]; with a list of B generators, each sample draws from its own."""
    return _draw(torch.rand, shape, generator, device)


def randn(shape, generator=None, device=None):
    """Standard normal float32 of `shape` [B, ...]; with a list of B generators, each sample draws from its own."""
    return _draw(torch.randn, shape, generator, device)
