"""A function over a stream of inputs, computed ahead by worker processes, with the results in order."""

import functools
import os
import signal
import threading
import time

import torch
from torch.utils.data import DataLoader

from utils.errors import UserError
from utils.stop import STOP_SIGNALS


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
