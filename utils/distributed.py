"""Several processes that train or sample together, as torchrun starts them. In a single one all of this does nothing.

Tensors on the CPU travel by gloo, those on a GPU by NCCL. Every function below but the first four has to be called by
all processes alike: each waits there for the others, at most TIMEOUT.
"""

import contextlib
import datetime
import functools
import itertools
import json
import os
import signal
import sys
import time

import torch
from torch import distributed as dist
from torch import nn

from utils.errors import UserError

TIMEOUT = datetime.timedelta(minutes=30)  # more than validation and pictures take, which the others wait for
_PATIENCE = 3  # seconds that a process which is to be stopped waits for it
_store = None  # of torchrun: keys and values that all processes see
_rounds = itertools.count()  # all processes take part in the same ones


def world_size():
    """Number of processes."""
    return dist.get_world_size() if _store else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if _store else 0


def local_rank():
    """Number of this process among those on its machine, which is that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if _store else 0


def is_main():
    """Whether this is the process that logs, shows progress and writes files."""
    return rank() == 0


def start():
    """Meet the other processes that torchrun has started. UserError where they cannot be found."""
    global _store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        int(os.environ["LOCAL_RANK"])
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} but the other processes cannot be reached ({error}); "
                        "start them with torchrun, or unset WORLD_SIZE") from error
    _store = dist.PrefixStore("infty_diff", store)
    show = sys.excepthook

    def show_and_leave(kind, error, trace):
        if first_to_fail(repr(error)):
            show(kind, error, trace)
        leave(1)

    sys.excepthook = show_and_leave


def leave(code=0):
    """End this process if it is one of several; with code 0 when all others are done. In a single one, just return."""
    if not _store:
        return
    if code == 0:
        barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread of gloo's that still needs Python would abort a process in which it ends in order


def data_parallel(loss, modules):
    """loss(modules, ...) as a function of its other arguments, whose backward leaves averages over all processes in the
    gradients of the modules (torch's DistributedDataParallel, which sends them while backward goes on)."""
    if not _store:
        return functools.partial(loss, modules)
    return nn.parallel.DistributedDataParallel(_Bound(loss, modules), gradient_as_bucket_view=True)


class _Bound(nn.Module):
    def __init__(self, loss, modules):
        super().__init__()
        self.loss, self.trained = loss, modules

    def forward(self, *arguments):
        return self.loss(self.trained, *arguments)


def exchanged_later(loss, later):
    """Context for a call of a data_parallel loss and its backward. Where `later` is true, gradients are added to those
    there are and stay in this process; the first backward where it is not averages the sums."""
    return loss.no_sync() if _store and later else contextlib.nullcontext()


def barrier():
    """Wait for all processes."""
    any_rank(False)


def any_rank(flag):
    """Whether `flag` is true in any of the processes."""
    return bool(largest(int(bool(flag))))


def largest(number):
    """The largest of the processes' integers."""
    if not _store:
        return number
    result = torch.tensor([number])
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result.item()


def from_main(function):
    """What function() gives in the main process, in all of them; it is called there alone."""
    if not _store:
        return function()
    result = [function() if is_main() else None]
    dist.broadcast_object_list(result)
    return result[0]


def mean(terms):
    """{name: scalar tensor} averaged over the processes, float32."""
    if not _store:
        return terms
    values = torch.stack([term.detach().float() for term in terms.values()])
    dist.all_reduce(values)
    return dict(zip(terms, values / world_size(), strict=True))


def share(count):
    """The part of range(count) that falls to this process: contiguous, in the order of ranks, as equal as can be."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def deal(items):
    """Yield the items of a list or range, each in one of the processes: whoever is ready takes the next one."""
    if not _store:
        yield from items
        return
    name = f"items dealt in round {next(_rounds)}"
    while (place := _store.add(name, 1) - 1) < len(items):
        yield items[place]


def gather(values):
    """values [n, ...] of all processes in the order of ranks, [world_size · n, ...]; n is the same in all of them."""
    if not _store:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def concatenate(parts):
    """The tensors [any, D] in the lists `parts` of all processes, in the order of ranks, as one on the CPU.

    A process may have none; at least one has some.
    """
    own = torch.cat(parts).cpu() if parts else None
    if not _store:
        return own
    shapes = [None] * world_size()
    dist.all_gather_object(shapes, None if own is None else (len(own), own.shape[1], own.dtype))
    lengths = [shape[0] if shape else 0 for shape in shapes]
    _, width, dtype = next(shape for shape in shapes if shape)
    padded = torch.zeros(max(lengths), width, dtype=dtype)
    if own is not None:
        padded[:len(own)] = own
    gathered = gather(padded).unflatten(0, (world_size(), -1))
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])


def first_to_fail(reason):
    """Whether this process is the first to fail, and so the one to say why (`reason`, which torchrun repeats).

    The others fail because of it, or in the same way: they wait here for torchrun to stop them.
    """
    if not _store:
        return True
    try:
        first = _store.add("failures", 1) == 1
    except RuntimeError:  # its keeper is gone
        first = False
    if first:
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path:
            with open(path, "w") as file:
                details = {"py_callstack": reason, "timestamp": str(int(time.time()))}
                json.dump({"message": {"message": reason, "extraInfo": details}}, file)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_PATIENCE)
    return first


def lost_connection(error):
    """One line for an error of the network between the processes; None for any other error."""
    text = str(error)
    if not isinstance(error, dist.DistError) and "gloo" not in text:
        return None
    if "timed out" in text.lower() or "timeout" in text.lower():
        return (f"waited {TIMEOUT.total_seconds() / 60:g} minutes for the other processes; one of them hangs, or the "
                "network between them is broken")
    return "lost the connection to another process; it was killed, or its machine or the network is gone"
