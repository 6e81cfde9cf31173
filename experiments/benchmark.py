"""Measure the operator, the search for nearest points, the training step and sampling on this machine.

    python experiments/benchmark.py --config configs/benchmark_64.py --against reference --output benchmark.json

Prints a Markdown table per suite; --output also writes the numbers as JSON. Weights and images are random.
"""

import sys
import time
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_inf_ae_diffusion as stage_1
from experiments.lib import benchmark_suites
from utils import cli, config
from utils.device import environment, resolve_device
from utils.errors import UserError
from utils.files import check_output_file, write_json

SUITES = ("operator", "knn", "training", "parts", "sampling")
CHOSEN = flags.DEFINE_list("suites", list(SUITES), f"suites to run, of {', '.join(SUITES)}")
AGAINST = flags.DEFINE_enum("against", None, ["reference"], "also measure the reference implementation")
REPEATS = flags.DEFINE_integer("repeats", 7, "number of measurements, whose median is reported", lower_bound=1)
STEPS = flags.DEFINE_integer("sampling_steps", 20, "network evaluations of the sampling suite", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the numbers")


def main():
    unknown = [name for name in CHOSEN.value if name not in SUITES]
    if unknown or not CHOSEN.value:
        raise UserError(f"--suites={','.join(unknown)} is unknown; choose from {', '.join(SUITES)}")
    check_output_file(OUTPUT.value, "output")
    cfg = config.read_autoencoder_config(stage_1.CONFIG)
    device, against = resolve_device(cfg.run.device), AGAINST.value is not None
    benchmark_suites.make_trainer(stage_1, cfg, device)  # reports mistakes in the config before the first suite
    measure = {
        "operator": lambda: benchmark_suites.operator(device, REPEATS.value),
        "knn": lambda: benchmark_suites.knn(device, REPEATS.value),
        "training": lambda: benchmark_suites.training(stage_1, cfg, device, REPEATS.value, against),
        "parts": lambda: benchmark_suites.parts(stage_1, cfg, device, REPEATS.value),
        "sampling": lambda: benchmark_suites.sampling(cfg, device, max(1, REPEATS.value // 2), against, STEPS.value),
    }
    result = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "environment": environment(),
              "threads": torch.get_num_threads(), "config": cfg.to_dict(), "suites": {}}
    print(f"{result['environment']['machine']}, {result['threads']} threads, {result['date']}, "
          f"`python {result['command']}`")
    for name in CHOSEN.value:
        rows = result["suites"][name] = measure[name]()
        if OUTPUT.value:  # after each suite, so that an interrupted run keeps its numbers
            write_json(OUTPUT.value, result)
        print(f"\n{getattr(benchmark_suites, name).__doc__.strip()}\n\n{markdown(rows)}", flush=True)


def markdown(rows):
    """Rows (dicts with the same keys) as a Markdown table, without columns that are empty in all rows."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    lines = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


if __name__ == "__main__":
    cli.run(main)
