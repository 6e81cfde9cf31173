"""Batches of a data set, read ahead by worker processes.

The training stream is a pure function of (seed, position). Position p lies in epoch p // N and shows the item
permutation(seed, epoch)[p % N] in an orientation drawn from (seed, epoch, item). The number of workers, the number of
ranks and interruptions do not affect it. Step s trains on positions s · batch_size to (s + 1) · batch_size − 1.
"""

import atexit
import functools
import itertools
import multiprocessing.queues
import os
import signal
import sys
import threading
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Subset

from utils import distributed
from utils.errors import UserError
from utils.rng import generator, seed_of
from utils.shutdown import STOP_SIGNALS

UPRIGHT = (0, False)  # the orientation of the image itself


class Batch(NamedTuple):
    """Images with their indices and conditions."""

    images: torch.Tensor  # float32 [B, C, H, W] in [-1, 1]
    index: torch.Tensor  # int64 [B] on the CPU: positions in the training stream, or items
    condition: torch.Tensor | None = None  # int64 [B] or float32 [B, D]; None if the data set has none


def training_batches(dataset, batch_size, seed, start_step=0, num_workers=0, device="cpu", accumulation_steps=1):
    """Yield a `Batch` for each of `training_positions`, endlessly, in random orientations of the data set."""
    keys = ([_training_key(dataset, seed, position) for position in positions]
            for positions in training_positions(batch_size, start_step, accumulation_steps))
    yield from _load(dataset, keys, num_workers, device)


def training_positions(batch_size, start_step=0, accumulation_steps=1):
    """Yield the positions (a range) of every micro-batch of this rank from start_step on, endlessly.

    A step's batch_size positions are divided into equal, contiguous parts, one per rank, and each of these into
    accumulation_steps micro-batches.
    """
    parts = distributed.world_size() * accumulation_steps
    size = batch_size // parts
    first = distributed.rank() * accumulation_steps
    for step in itertools.count(start_step):
        for part in range(step * parts + first, step * parts + first + accumulation_steps):
            yield range(part * size, (part + 1) * size)


def training_item(count, seed, position):
    """(item, epoch) at a position of the training stream over `count` items."""
    epoch, place = divmod(position, count)
    return int(_permutation(count, seed, epoch)[place]), epoch


@functools.lru_cache(maxsize=4)  # a batch may span epochs
def _permutation(count, seed, epoch):
    return torch.randperm(count, generator=generator("cpu", seed, "order", epoch))


def _training_key(dataset, seed, position):
    """(position, item, orientation)."""
    item, epoch = training_item(len(dataset), seed, position)
    turns = sorted({turn for turn, _ in dataset.orientations})
    turn = turns[seed_of(seed, "turn", epoch, item) % len(turns)]
    return position, item, (turn, dataset.flips and bool(seed_of(seed, "flip", epoch, item) & 1))


def all_batches(dataset, batch_size, device="cpu", num_workers=0, orientation=UPRIGHT, divided=False, start=0):
    """Yield a `Batch` with the indices of its items, over the whole set once, in order.

    orientation  of every image, one of dataset.orientations
    divided      True to divide the batches between the ranks: a contiguous part each, in the order of ranks
    start        number of this rank's batches to skip at the beginning
    The last batch may be smaller.
    """
    starts = range(0, len(dataset), batch_size)
    if divided:
        starts = [starts[place] for place in distributed.share(len(starts))]
    starts = starts[start:]
    keys = ([(i, i, orientation) for i in range(first, min(first + batch_size, len(dataset)))] for first in starts)
    yield from _load(dataset, keys, min(num_workers, len(starts)), device)


def to_float(images):
    """uint8 to float32 in [-1, 1]; float32 is returned as it is."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def oriented(image, orientation):
    """The image [C, H, W], turned and mirrored by orientation = (quarter turns, True to mirror from left to right)."""
    turns, mirrored = orientation
    image = torch.rot90(image, turns, (-2, -1))
    return image.flip(-1) if mirrored else image


def _load(dataset, batches_of_keys, num_workers, device):
    """Yield a Batch on the device for each list of (index, item, orientation)."""
    device = torch.device(device)
    whole = getattr(dataset, "dataset", dataset)  # the data set behind a torch Subset
    workers = 0 if getattr(whole, "in_memory", False) else num_workers
    fetch = functools.partial(_fetch, dataset)
    for images, index, condition in map_in_workers(fetch, batches_of_keys, workers, pin_memory=device.type == "cuda"):
        images = to_float(images.to(device, non_blocking=True))  # converted there, so that 8 bits are copied
        yield Batch(images, index, None if condition is None else condition.to(device, non_blocking=True))


def _fetch(dataset, keys):
    examples = [_read(dataset, item) for _, item, _ in keys]
    images = [oriented(image, orientation) for (image, _), (_, _, orientation) in zip(examples, keys, strict=True)]
    condition = None if examples[0][1] is None else torch.stack([condition for _, condition in examples])
    return torch.stack(images), torch.tensor([index for index, _, _ in keys]), condition


def _read(dataset, item):
    if isinstance(dataset, Subset):
        return _read(dataset.dataset, dataset.indices[item])
    return dataset.with_condition(item) if hasattr(dataset, "with_condition") else (dataset[item], None)


def map_in_workers(function, inputs, num_workers, pin_memory=False):
    """Yield function(x) for every x of an iterable, which may be endless, in order, computed ahead.

    num_workers   worker processes, at most one per core; 0 computes in this process
    pin_memory    put the tensors of the results into page-locked memory, for fast copies to a GPU
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
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # otherwise it draws from the global one
    )
    if workers and multiprocessing.get_start_method() == "forkserver":
        _start_fork_server()
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


class _Results:
    """The data set whose item x is function(x)."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, x):
        try:
            return self.function(x)
        except UserError as error:
            return error  # raised in a worker, its message would include the worker's traceback


def _start_fork_server():
    """Start the server that forks workers, if it does not run yet. It ignores signals to stop, as workers do."""
    from multiprocessing import forkserver

    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)


def _start_worker(_):
    """Prepare this worker for every end of its parent.

    Signals to stop reach all processes of a terminal or a job. Workers ignore them: the parent finishes its step, for
    which it may need them. A parent that ends by itself kills its workers; this thread sees one that was killed.
    A worker that cannot send a result, for lack of shared memory or sockets, ends: otherwise the parent would wait for
    the result for ever.
    """
    def fail(error, _):
        print(f"a worker cannot send its result: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(fail)  # multiprocessing's hook
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()  # os.getppid() is the server under the start method forkserver
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@atexit.register  # runs before multiprocessing's own handler, which waits for workers, and these ignore its SIGTERM
def _kill_workers():
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error for a killed worker
    for worker in multiprocessing.active_children():
        worker.kill()


def _identity(result):
    return result
