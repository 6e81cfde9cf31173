"""Training runs that are killed, each in a process forked from this one, which saves the import of torch.

    python -m tests.killed_runs <JSON file of jobs>

A job is {"command": [script, argument, ...], "kill_at": step or null, "signals": {step: [name, ...]}, "record": file}.
The process gets SIGKILL at the beginning of the step `kill_at`. It and its workers get the signals, as from a terminal
or a scheduler. A digest of the draws of every step goes to the record.
Prints the exit codes, negative for signals, and the end of each process's stderr.
"""

import hashlib
import json
import os
import signal
import sys

import torch

import data.latents  # noqa: F401  # imported here once, instead of by every process
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
    """Patch the trainer so that this process records its draws and receives its signals."""
    training_step, training_losses = Trainer.training_step, GaussianDiffusion.training_losses
    random, step, drawn = Coordinates.random, [None], []

    def note(*tensors):
        if step[0] is not None:
            drawn.extend(tensor.clone() for tensor in tensors)

    def step_with_signals(trainer, batch):
        if trainer.step == job.get("kill_at"):
            trainer.checkpoints.wait()  # so that the step it resumes from is known
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
