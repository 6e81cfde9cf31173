"""Train stage 1 while killing it at random instants, and check that it ends as a run that nobody disturbed.

    python experiments/soak.py [--config configs/demo_config.py] [--minutes 15] [--steps 300] [--seed 0]

In rounds, until the minutes are over: a run gets SIGKILL, or sometimes SIGTERM, and the same command starts it again,
until it has made its steps. Then its checkpoints, metrics and pictures have to equal those of the undisturbed run bit
for bit. In float32 on the CPU, and with so many checkpoints, validations and pictures that kills meet all of them. Exit
code 1 where anything differs; the folder of that round is then kept.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from utils import cli, config
from utils.checkpoint import load_checkpoint
from utils.device import ROOT
from utils.errors import UserError
from utils.files import check_writable
from utils.logging import read_metrics
from utils.shutdown import REQUEUE

CONFIG = config.define_config_flag("config", "autoencoder config", str(ROOT / "configs" / "demo_config.py"))
MINUTES = flags.DEFINE_float("minutes", 15.0, "a round is begun until then", lower_bound=0.0)
STEPS = flags.DEFINE_integer("steps", 300, "training steps of a round", lower_bound=20)
SEED = flags.DEFINE_integer("seed", 0, "of the instants and the signals")
OUTPUT = flags.DEFINE_string("output", "soak", "folder of the runs, which must not be there yet")
TERM_SHARE = 0.3  # of the signals that are SIGTERM
MEASURED = ("seconds", "peak_memory_gb")  # entries of metrics and checkpoints: of the machine, not of the run
PATIENCE = 300  # seconds in which a step has to end and be saved after SIGTERM


def main():
    cfg = config.read_autoencoder_config(CONFIG)
    folder = Path(OUTPUT.value).absolute()
    if folder.exists():
        raise UserError(f"--output={OUTPUT.value} is there already; remove it or choose another folder")
    check_writable(folder, f"--output={OUTPUT.value}")
    command = prepare(cfg, folder)
    ends = time.monotonic() + 60 * MINUTES.value

    print(f"{STEPS.value} steps undisturbed", flush=True)
    whole_seconds = finish(command, folder / "whole")
    start_seconds = finish(command, folder / "whole")  # nothing is left to do but to start
    longest = 2 * start_seconds + (whole_seconds - start_seconds) / 8
    print(f"took {whole_seconds:.0f} s, of which {start_seconds:.0f} s to start; from now on a process lives at most "
          f"{longest:.0f} s", flush=True)

    chance, rounds, total = random.Random(SEED.value), 0, {"SIGKILL": 0, "SIGTERM": 0}
    while rounds == 0 or time.monotonic() < ends:
        rounds += 1
        disturbed = folder / f"round_{rounds}"
        for name in killed(command, disturbed, chance, longest):
            total[name] += 1
        wrong = first_difference(folder / "whole", disturbed)
        if wrong:
            sys.exit(f"round {rounds}: {wrong} of {disturbed} is not what it is in the undisturbed run")
        print(f"round {rounds}: the same, bit for bit; survived so far: {total['SIGKILL']} SIGKILL, "
              f"{total['SIGTERM']} SIGTERM", flush=True)
        shutil.rmtree(disturbed)


def prepare(cfg, folder):
    """Write the config of the runs; returns the command that trains, which only lacks --config.run.output_dir."""
    steps = STEPS.value
    cfg.run.device, cfg.run.wandb_mode, cfg.run.experiment = "cpu", "disabled", "run"
    cfg.train.precision, cfg.train.max_steps = "fp32", steps
    cfg.train.plot_graph_steps, cfg.train.checkpoint_steps = 5, max(1, steps // 20)
    cfg.train.validate_steps, cfg.train.plot_samples_steps = steps // 5, steps // 3
    folder.mkdir(parents=True)
    path = folder / "soak_config.py"
    path.write_text("from ml_collections import ConfigDict\n\n\n"
                    f"def get_config():\n    return ConfigDict({cfg.to_dict()!r})\n")
    return [sys.executable, str(ROOT / "train_inf_ae_diffusion.py"), "--config", str(path)]


def start(command, output):
    """The command in a group of processes of its own; what it says goes to a file beside its folder."""
    with open(f"{output}.log", "ab") as log:
        return subprocess.Popen([*command, f"--config.run.output_dir={output}"], cwd=ROOT, stdout=log, stderr=log,
                                start_new_session=True)


def finish(command, output):
    """Run the command to its end; returns the seconds that it took."""
    began = time.monotonic()
    check_code(start(command, output).wait(), {0}, output)
    return time.monotonic() - began


def killed(command, output, chance, longest):
    """Run the command again and again, each time for `longest` seconds at most, until it ends by itself; yields the
    name of every signal that ended it."""
    while True:
        process = start(command, output)
        try:
            check_code(process.wait(chance.uniform(0, longest)), {0}, output)
            return
        except subprocess.TimeoutExpired:
            name = "SIGTERM" if chance.random() < TERM_SHARE else "SIGKILL"
            os.killpg(process.pid, getattr(signal, name))
        code = process.wait(PATIENCE)
        # SIGTERM: saved; or dead, where it came before there was anything to save; or done, where it came too late
        check_code(code, {-signal.SIGKILL} if name == "SIGKILL" else {REQUEUE, -signal.SIGTERM, 0}, output)
        yield name


def check_code(code, expected, output):
    """End with the last line of the log where a process ended in another way than it should."""
    if code not in expected:
        last = Path(f"{output}.log").read_text(errors="replace").strip().splitlines()[-1:]
        sys.exit(f"a run in {output} ended with code {code}: {' '.join(last)}")


def first_difference(whole, other):
    """Name of the first thing that differs between two runs, None where nothing does."""
    whole, other = whole / "run", other / "run"
    for name in ("checkpoint.pt", "best_checkpoint.pt"):
        a, b = ({key: value for key, value in load_checkpoint(run / name).items() if key not in ("config", *MEASURED)}
                for run in (whole, other))
        if not same(a, b):
            return f"{name}, {', '.join(key for key in a.keys() | b.keys() if not same(a.get(key), b.get(key)))}"
    lines = [[{key: value for key, value in line.items() if key not in MEASURED}
              for line in read_metrics(run / "metrics.jsonl")] for run in (whole, other)]
    if lines[0] != lines[1]:
        return "metrics.jsonl"
    pictures = [{path.name: path.read_bytes() for path in (run / "images").iterdir()} for run in (whole, other)]
    return None if pictures[0] == pictures[1] else "images"


def same(a, b):
    """Whether nested dicts, lists and tuples of tensors and plain data are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


if __name__ == "__main__":
    cli.run(main)
