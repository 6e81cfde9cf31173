"""What the processes of test_distributed.py run: `torchrun distributed_worker.py <case> <folder for results>`."""

import datetime
import functools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from utils import cli, distributed
from utils.errors import UserError


def collectives(folder):
    """Writes what each helper gives in this process."""
    me = distributed.rank()
    results = {
        "rank": me, "world": distributed.world_size(), "main": distributed.is_main(),
        "any": [distributed.any_rank(flag) for flag in (False, me == 1, True)],
        "from_main": distributed.from_main(lambda: ["made by", me]),
        "share": list(distributed.share(5)),
        "gather": distributed.gather(torch.tensor([[me, 0], [me, 1]])),
        "concatenate": distributed.concatenate([torch.full((2, 3), me), torch.full((1 + me, 3), 10 + me)]),
        "of one alone": distributed.concatenate([torch.ones(2, 3)] if me == 1 else []),
    }
    torch.save(results, folder / f"{me}.pt")


def fails(folder):
    if distributed.rank() == 1:
        raise UserError("data.root_dir='x' is wrong")
    distributed.barrier()


def has_a_bug(folder):
    if distributed.rank() == 1:
        raise KeyError("no such thing")
    distributed.barrier()


def is_killed(folder):
    if distributed.rank() == 1:
        os.kill(os.getpid(), 9)
    distributed.barrier()


def hangs(folder):
    if distributed.rank() == 1:
        time.sleep(60)
    distributed.barrier()


if __name__ == "__main__":
    sys.argv, (case, folder) = sys.argv[:1], sys.argv[1:]
    if case == "hangs":
        distributed.TIMEOUT = datetime.timedelta(seconds=1.5)
    cli.run(functools.partial(globals()[case], Path(folder)), shared=True)
