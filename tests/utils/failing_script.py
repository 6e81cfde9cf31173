"""What test_exits.py runs: `failing_script.py <start method> <failure>`, a script with two workers that fails."""

import functools
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from data.loader import map_in_workers
from utils import cli
from utils.errors import UserError
from utils.shutdown import Stopped, StopRequest


def work(failure, x):
    if x == 5 and failure == "worker raises":
        raise RuntimeError("no such thing")
    if x == 5 and failure == "worker is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if failure == "no shared memory":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return torch.zeros(1000)
    return x


def main(failure):
    with StopRequest() as request:
        for x in map_in_workers(functools.partial(work, failure), itertools.count(), 2):
            if x == 20 and failure == "raises":
                raise KeyError("no such thing")
            if x == 20 and failure == "full disk":
                raise OSError(28, "No space left on device")
            if x == 20 and failure == "mistake":
                raise UserError("data.root_dir='x' is wrong")
            if x == 20 and failure == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if x == 20 and failure == "job is stopped":
                os.killpg(0, signal.SIGTERM)
                time.sleep(1)
            if x == 40 and request.signal:  # which took batches made after the signal
                raise Stopped("stopped", 75)


if __name__ == "__main__":
    method, failure = sys.argv[1:]
    del sys.argv[1:]
    multiprocessing.set_start_method(method)
    cli.run(functools.partial(main, failure))
