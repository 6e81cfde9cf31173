"""What the processes of test_distributed.py run: `torchrun distributed_worker.py <case> <folder for results>`."""

import datetime
import functools
import itertools
import os
import runpy
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from data.latents import load_latents
from data.loader import training_batches, training_positions
from diffusion.timestep_samplers import LossSecondMomentSampler
from experiments.lib.image_folders import ImageFolder
from experiments.metrics.features import FeatureModel, extract
from experiments.metrics.fid import cached_statistics, statistics
from tests.data.numbers import Numbers
from tests.tiny import tiny_config
from utils import cli, distributed
from utils.errors import UserError
from utils.trainer import Trainer


def helpers():
    """What each helper gives in this process."""
    me = distributed.rank()
    return {
        "rank": me, "world": distributed.world_size(), "main": distributed.is_main(),
        "any": [distributed.any_rank(flag) for flag in (False, me == 1, True)],
        "from_main": distributed.from_main(lambda: ["made by", me]),
        "mean": distributed.mean({"a": torch.tensor(me), "b": torch.tensor(2.0)}),
        "share": list(distributed.share(5)),
        "deal": [list(distributed.deal(range(7))), list(distributed.deal(range(3)))],
        "gather": distributed.gather(torch.tensor([[me, 0], [me, 1]])),
        "concatenate": distributed.concatenate([torch.full((2, 3), me), torch.full((1 + me, 3), 10 + me)]),
        "of one alone": distributed.concatenate([torch.ones(2, 3)] if me == 1 else []),
    }


def shared_work(folder):
    """What all that divides its work gives in this process; in one process, for comparison, everything."""
    numbers = Numbers(7)

    positions = list(itertools.islice(training_positions(8, start_step=5, accumulation_steps=2), 4))
    sampler = LossSecondMomentSampler(3)
    for index in map(torch.tensor, positions[:2]):
        sampler.record(index % 3, index.float().sin())
    sampler.end_step()

    images = ImageFolder(folder / "images", 7, {})
    made = []
    for indices, progress in images.missing_batches(2):
        made += indices
        images.save(indices, torch.tensor(indices)[:, None, None, None].expand(-1, 3, 4, 4) / 10)
        progress(1)

    batches = list(itertools.islice(training_batches(numbers, 4, seed=0), 3))
    latents = load_latents(folder / "latents.pt", "key", lambda images: images.mean((2, 3)), numbers, Numbers(3), 2,
                           "cpu")
    model = FeatureModel("name", "score", 4, lambda image: image.astype("float32"), lambda images: images.mean((2, 3)),
                         torch.device("cpu"), None, "")
    features = extract(numbers, model, batch_size=2)
    known = [cached_statistics(folder, "numbers", "key", lambda: statistics(features)) for _ in range(2)]
    return {"positions": positions, "sampler": sampler.state_dict(), "made": made, "images": images.load(),
            "index": [batch.index for batch in batches], "batches": [batch.images for batch in batches],
            "latents": latents.train, "heldout": latents.heldout, "features": torch.from_numpy(features),
            "mean": known[1] and torch.from_numpy(known[1].mean)}


def bad_steps(folder):
    """Steps of which two are not finite in the last process alone: (how many were left out, the weights after them)."""
    config = tiny_config(folder)
    config.train.nonfinite, config.train.max_steps = "skip", 4

    def loss(modules, batch, step):
        value = modules["net"](batch).square().mean()
        if distributed.rank() == 1 and step == 1:
            value = value * float("nan")
        if distributed.rank() == 1 and step == 2:
            value = value + (value - value.detach()).sqrt()  # 0, but its slope is infinite
        return {"loss": value}

    torch.manual_seed(0)
    modules = torch.nn.ModuleDict({"net": torch.nn.Linear(3, 1)})
    trainer = Trainer(config, "autoencoder", modules, loss, torch.device("cpu"))
    trainer.train(lambda _: itertools.repeat(torch.eye(3)), lambda _: {}, lambda _, tick: {}, plot_steps=0)
    return trainer.optimiser.nonfinite, trainer.modules.state_dict()


def works(folder):
    torch.save((helpers() | {"bad steps": bad_steps(folder)}, shared_work(folder)), folder / f"{distributed.rank()}.pt")


def is_stopped(*command):
    """Run a training script; after its step 6 the last process alone is told to stop."""
    training_step = Trainer.training_step

    def step(trainer, batches):
        training_step(trainer, batches)
        if trainer.step == 6 and not distributed.is_main():
            os.kill(os.getpid(), signal.SIGUSR1)

    Trainer.training_step = step
    run_as_script(command)


def is_stopped_before_evaluation(*command):
    """Run a training script; after its step 2 the last process alone is told to stop, and the main process must not
    evaluate first."""
    training_step = Trainer.training_step

    def step(trainer, batches):
        training_step(trainer, batches)
        if trainer.step == 2 and not distributed.is_main():
            os.kill(os.getpid(), signal.SIGUSR1)

    def evaluate(*_):
        raise AssertionError("evaluated first")

    Trainer.training_step, Trainer._evaluate = step, evaluate
    run_as_script(command)


def is_stopped_in_pictures(*command):
    """Run a training script; while it samples images the main process alone is told to stop."""
    tick = Trainer._tick

    def interrupted(trainer):
        os.kill(os.getpid(), signal.SIGUSR1)
        return tick(trainer)

    Trainer._tick = interrupted
    run_as_script(command)


def run_as_script(command):
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


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
    sys.argv, (case, folder, *arguments) = sys.argv[:1], sys.argv[1:]
    if case.startswith("is_stopped"):
        globals()[case](*arguments)
    else:
        if case == "hangs":
            distributed.TIMEOUT = datetime.timedelta(seconds=1.5)
        cli.run(functools.partial(globals()[case], Path(folder)), shared=True)
