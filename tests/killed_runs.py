"""Training runs that are killed, each in a process forked from this one: importing torch for each would take seconds.

    python -m tests.killed_runs <file of jobs, JSON>

A job is {"command": [script, argument, ...], "kill_at": step or null, "signals": {step: [name, ...]}, "record": file}.
At the beginning of the step `kill_at` the process gets SIGKILL. Signals go to it and to its workers, as those of a
terminal or a scheduler do. What was drawn for every step goes to the record.
Prints the exit codes, negative for signals, and the end of each process's stderr.
"""

import hashlib
import json
import os
import signal
import sys

import torch

import data.latents  # noqa: F401  # what the scripts need: imported once, not by every process
import diffusion.sampling  # noqa: F401
import models.load  # noqa: F401
from data.coordinates import Coordinates
from diffusion.gaussian_diffusion import GaussianDiffusion
from tests.scripts import run_script
from utils.trainer import Trainer


def main():
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = []
    for job in jobs:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            instrument(job)
            result = run_script(*job["command"])
            os.write(write, result.err[-2000:].encode())
            os._exit(result.code)
        os.close(write)
        with os.fdopen(read) as pipe:
            error = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        results.append({"code": code, "err": error})
    print(json.dumps(results))


def instrument(job):
    """Have this process record its draws, and get its signals."""
    training_step, training_losses = Trainer.training_step, GaussianDiffusion.training_losses
    random, step, drawn = Coordinates.random, [None], []

    def note(*tensors):
        if step[0] is not None:
            drawn.extend(tensor.clone() for tensor in tensors)

    def step_with_signals(trainer, batch):
        if trainer.step == job.get("kill_at"):
            trainer.checkpoints.wait()  # so that it is known where the run goes on
            os.kill(os.getpid(), signal.SIGKILL)
        for name in job.get("signals", {}).get(str(trainer.step), []):
            os.killpg(0, getattr(signal, name))
        step[0] = trainer.step
        training_step(trainer, batch)
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in drawn)).hexdigest()
        with open(job["record"], "a") as file:
            file.write(json.dumps({"step": step[0], "draws": len(drawn), "digest": digest}) + "\n")
        step[0] = None
        drawn.clear()

    def losses_noted(diffusion, model_fn, x0, t, coords, noise=None, generator=None):
        note(x0, t, noise)
        return training_losses(diffusion, model_fn, x0, t, coords, noise, generator)

    def random_noted(*arguments, **keywords):
        coords = random(*arguments, **keywords)
        note(coords.index)
        return coords

    Trainer.training_step, GaussianDiffusion.training_losses = step_with_signals, losses_noted
    Coordinates.random = random_noted


if __name__ == "__main__":
    main()
