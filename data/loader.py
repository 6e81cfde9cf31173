"""A function over a stream of inputs, computed ahead by worker processes, with the results in order.

Batches of a data set: the endless, resumable training stream, and one pass over everything.

The training stream is a pure function of (seed, position): the global sample index p lies in epoch p // N and is item
permutation(seed, epoch)[p % N], flipped or not by a coin of (seed, epoch, item). Nothing else (workers, processes,
where a run was interrupted) enters. Step s consists of positions s · batch_size to (s + 1) · batch_size − 1.
"""

import functools
import itertools
import os
import signal
import threading
import time
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Subset

from utils import distributed
from utils.errors import UserError
from utils.rng import generator, seed_of
from utils.shutdown import STOP_SIGNALS


def map_in_workers(function, inputs, num_workers, pin_memory=False):
    """Yield function(x) for every x of an iterable, which may be endless, in order.

    num_workers   processes besides this one; 0 computes here. More than this machine has cores are not started.
    pin_memory    tensors in the results come in page-locked memory, for fast copies to a GPU
    A UserError raised by the function is raised here.
    """
    workers = min(num_workers, os.cpu_count())
    results = DataLoader(
        _Results(function),
        sampler=inputs,
        batch_size=None,  # one input, one result
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
        generator=torch.Generator(),  # or else it would draw from the global one
    )
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


class _Results:
    """function(x) under the index x."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, x):
        try:
            return self.function(x)
        except UserError as error:
            return error  # raised in a worker, it would arrive with that worker's traceback as its message


def _start_worker(parent, _):
    """End this worker when its parent is gone: handing over a result that nobody takes, it would wait for ever.

    A request to stop, which a terminal or a scheduler sends to all processes, is the parent's business: it will finish
    its step, for which it may need this worker.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _identity(result):
    return result


class Batch(NamedTuple):
    """images float32 [B, C, H, W] in [-1, 1] and the global sample index of each, int64 [B] (on the CPU)."""

    images: torch.Tensor
    index: torch.Tensor


def training_positions(batch_size, start_step=0, accumulation_steps=1):
    """Yield, without end, the positions (a range) of every batch that this process works on, from start_step on.

    A step's batch_size positions are cut into as many equal, contiguous parts as there are processes, and each of these
    into accumulation_steps, which is how many batches a process takes per step.
    """
    parts = distributed.world_size() * accumulation_steps
    size = batch_size // parts
    first = distributed.rank() * accumulation_steps
    for step in itertools.count(start_step):
        for part in range(step * parts + first, step * parts + first + accumulation_steps):
            yield range(part * size, (part + 1) * size)


def training_batches(dataset, batch_size, seed, start_step=0, num_workers=0, device="cpu", augment=True,
                     accumulation_steps=1):
    """Yield a `Batch` for each of `training_positions`, without end; `augment` flips half of the images."""
    keys = ([(p, *training_item(len(dataset), seed, p, augment)) for p in positions]
            for positions in training_positions(batch_size, start_step, accumulation_steps))
    for images, index in _load(dataset, keys, num_workers, device):
        yield Batch(images, index)


def all_batches(dataset, batch_size, device="cpu", num_workers=0, mirrored=False, divided=False, start=0):
    """Yield (images float32 [B, C, H, W] in [-1, 1], item indices int64 [B]) over the whole set once, in order.

    mirrored   every image flipped from left to right, or none
    divided    the batches are divided between the processes: a contiguous part for each, in the order of ranks
    start      how many of this process's batches to leave out, at the beginning
    The last batch may be smaller.
    """
    starts = range(0, len(dataset), batch_size)
    if divided:
        starts = [starts[place] for place in distributed.share(len(starts))]
    starts = starts[start:]
    keys = ([(i, i, mirrored) for i in range(first, min(first + batch_size, len(dataset)))] for first in starts)
    yield from _load(dataset, keys, min(num_workers, len(starts)), device)


def to_float(images):
    """uint8 to float32 in [-1, 1]; what is float32 already stays."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def training_item(count, seed, position, augment):
    """(item, whether to flip it) at a position of the training stream over `count` items."""
    epoch, place = divmod(position, count)
    item = int(_permutation(count, seed, epoch)[place])
    return item, augment and bool(seed_of(seed, "flip", epoch, item) & 1)


@functools.lru_cache(maxsize=4)  # a batch may span epochs
def _permutation(count, seed, epoch):
    return torch.randperm(count, generator=generator("cpu", seed, "order", epoch))


def _load(dataset, batches_of_keys, num_workers, device):
    """Yield (images on the device, float32; indices) for each list of (index, item, flipped)."""
    device = torch.device(device)
    whole = getattr(dataset, "dataset", dataset)  # of which a torch Subset is a part
    workers = 0 if getattr(whole, "in_memory", False) else num_workers
    fetch = functools.partial(_fetch, dataset)
    for images, index in map_in_workers(fetch, batches_of_keys, workers, pin_memory=device.type == "cuda"):
        yield to_float(images.to(device, non_blocking=True)), index  # 8 bits travel, not 32


def _fetch(dataset, keys):
    images = [_read(dataset, item).flip(-1) if flipped else _read(dataset, item) for _, item, flipped in keys]
    return torch.stack(images), torch.tensor([index for index, _, _ in keys])


def _read(dataset, item):
    if isinstance(dataset, Subset):
        return _read(dataset.dataset, dataset.indices[item])
    return dataset.exact(item) if hasattr(dataset, "exact") else dataset[item]
