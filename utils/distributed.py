"""Several ranks that train or sample together, started by torchrun. With one process every function is trivial.

CPU tensors travel over gloo, GPU tensors over NCCL. Functions marked "Collective" must be called by all ranks alike;
each rank waits there for the others, at most TIMEOUT.
"""

import contextlib
import datetime
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

TIMEOUT = datetime.timedelta(minutes=30)  # longer than the evaluation that the other ranks wait for
MEETING = datetime.timedelta(minutes=5)  # in which all ranks have to start
_PATIENCE = 3  # seconds in which torchrun should stop a rank that failed because of another
_store = None  # torchrun's key-value store, shared by all ranks
_rounds = itertools.count()  # of deal(); the same on all ranks


def world_size():
    """Number of ranks."""
    return dist.get_world_size() if _store else 1


def rank():
    """Rank of this process, from 0."""
    return dist.get_rank() if _store else 0


def local_rank():
    """Rank among the processes of this machine, which is also the index of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if _store else 0


def is_main():
    """True on the rank that logs, shows progress and writes files."""
    return rank() == 0


def start():
    """Connect to the other ranks that torchrun, or a script that sets its variables, has started. UserError if they
    cannot be reached."""
    global _store
    if not os.environ.get("WORLD_SIZE", "").strip() or _number("WORLD_SIZE") == 1:
        return
    own, _, _ = _number("RANK"), _number("LOCAL_RANK"), _number("MASTER_PORT")
    if own == 0 and not dist.is_torchelastic_launched():  # the variables may be left over
        print(f"waiting for the {os.environ['WORLD_SIZE']} processes of WORLD_SIZE", file=sys.stderr)
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=MEETING))
        store.set_timeout(TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} but the other processes cannot be reached ({error}); "
                        "start them with torchrun, or unset WORLD_SIZE to use one") from error
    _store = dist.PrefixStore("infty_diff", store)
    show = sys.excepthook

    def show_and_leave(kind, error, trace):
        if first_to_fail(repr(error)):
            show(kind, error, trace)
        leave(1)

    sys.excepthook = show_and_leave


def _number(name):
    text = os.environ.get(name, "")
    if not text.strip().isdigit() or name == "WORLD_SIZE" and int(text) == 0:
        raise UserError(f"{name}={text!r} in the environment must be a whole number; start several processes with "
                        "torchrun, or unset WORLD_SIZE to use one")
    return int(text)


def leave(code=0):
    """End this process if it is one of several ranks; with code 0 once all ranks are done. Otherwise just return."""
    if not _store:
        return
    if code == 0:
        barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # in an orderly exit, a gloo thread that still needs Python would abort the process


def data_parallel(loss, modules):
    """The function `loss`, which uses the parameters of `modules`; backward averages gradients over all ranks."""
    if not _store:
        return loss
    return nn.parallel.DistributedDataParallel(_Bound(loss, modules), gradient_as_bucket_view=True)


class _Bound(nn.Module):
    def __init__(self, loss, modules):
        super().__init__()
        self.loss, self.trained = loss, modules

    def forward(self, *arguments):
        return self.loss(*arguments)


def no_sync(loss, enabled):
    """Context for gradient accumulation: while enabled, backward of a data_parallel loss keeps gradients on this rank;
    the first backward without it averages the sums."""
    return loss.no_sync() if _store and enabled else contextlib.nullcontext()


def barrier():
    """Wait for all ranks. Collective."""
    any_rank(False)


def any_rank(flag):
    """True if `flag` is true on any rank. Collective."""
    return bool(largest(int(bool(flag))))


def largest(number):
    """The largest of the ranks' integers. Collective."""
    if not _store:
        return number
    result = torch.tensor([number])
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result.item()


def from_main(function):
    """The result of function(), called on the main rank only, on all ranks. Collective."""
    if not _store:
        return function()
    result = [function() if is_main() else None]
    dist.broadcast_object_list(result)
    return result[0]


def mean(terms):
    """{name: scalar tensor} averaged over the ranks, float32. Collective."""
    if not _store:
        return terms
    values = torch.stack([term.detach().float() for term in terms.values()])
    dist.all_reduce(values)
    return dict(zip(terms, values / world_size(), strict=True))


def share(count):
    """This rank's part of range(count): contiguous, in the order of ranks, of nearly equal lengths."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def deal(items):
    """Yield each item of a list or range on one of the ranks: whichever is ready takes the next. Collective."""
    if not _store:
        yield from items
        return
    name = f"items dealt in round {next(_rounds)}"
    while (place := _store.add(name, 1) - 1) < len(items):
        yield items[place]


def gather(values):
    """values [n, ...] of all ranks in order, [world_size · n, ...]; n must be the same on all ranks. Collective."""
    if not _store:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def concatenate(parts):
    """The tensors [any, D] in the lists `parts` of all ranks, in order, as one tensor on the CPU. Collective.

    A list may be empty on some ranks, but not on all.
    """
    own = torch.cat(parts).cpu() if parts else None
    if not _store:
        return own
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, own)
    return torch.cat([part for part in gathered if part is not None])


def first_to_fail(reason):
    """True on the first rank that fails, which is the one to print why. torchrun repeats its `reason` at the end.

    Other ranks usually fail because of the first, or for the same reason: here they wait for torchrun to stop them.
    """
    if not _store:
        return True
    try:
        first = _store.add("failures", 1) == 1
    except RuntimeError:  # the process that holds the store is gone
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
    """One line for an error in the connection between ranks; None for any other error."""
    text = str(error)
    if not isinstance(error, dist.DistError) and "gloo" not in text:
        return None
    if "timed out" in text.lower() or "timeout" in text.lower():
        return (f"waited {TIMEOUT.total_seconds() / 60:g} minutes for the other ranks; one of them hangs, or the "
                "network between them is broken")
    return "lost the connection to another rank; it was killed, or its machine or the network is gone"
