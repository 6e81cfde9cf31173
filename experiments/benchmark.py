"""Measure the operator, the search of neighbours, the training step and sampling on this machine.

    python experiments/benchmark.py --config configs/benchmark_64.py --against reference --output benchmark.json

Prints a Markdown table for each suite; --output also writes the numbers as JSON. Weights and images are random.
"""

import json
import sys
import time
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.lib import benchmark_suites as suites
from experiments.lib.benchmark_suites import machine
from utils import cli, config
from utils.device import environment, resolve_device
from utils.errors import UserError
from utils.files import check_output_file, replacing

CONFIG = config.define_config_flag("config", "autoencoder config of the suites training, parts and sampling")
SUITES = ("operator", "knn", "training", "parts", "sampling")
CHOSEN = flags.DEFINE_list("suites", list(SUITES), f"which of {', '.join(SUITES)}")
AGAINST = flags.DEFINE_enum("against", None, ["reference"], "measure the slow path as well, in the same run")
REPEATS = flags.DEFINE_integer("repeats", 7, "measurements of each, of which the median counts", lower_bound=1)
STEPS = flags.DEFINE_integer("sampling_steps", 20, "network evaluations of the sampling suite", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write as well")


def main():
    unknown = [name for name in CHOSEN.value if name not in SUITES]
    if unknown or not CHOSEN.value:
        raise UserError(f"--suites={','.join(unknown)} is unknown; choose from {', '.join(SUITES)}")
    check_output_file(OUTPUT.value, "output")
    cfg = config.read_autoencoder_config(CONFIG)
    device, against = resolve_device(cfg.run.device), AGAINST.value is not None
    if set(CHOSEN.value) & {"training", "parts", "sampling"}:
        suites.Step(cfg, device)  # says what is wrong with the config before the first suite
    measure = {
        "operator": lambda: suites.operator(device, REPEATS.value),
        "knn": lambda: suites.knn(device, REPEATS.value),
        "training": lambda: suites.training(cfg, device, REPEATS.value, against),
        "parts": lambda: suites.parts(cfg, device, REPEATS.value),
        "sampling": lambda: suites.sampling(cfg, device, max(1, REPEATS.value // 2), against, STEPS.value),
    }
    result = {"machine": machine(device), "date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv),
              "environment": environment(), "config": cfg.to_dict(), "suites": {}}
    print(f"{result['machine']}, {result['date']}, `python {result['command']}`")
    for name in CHOSEN.value:
        rows = result["suites"][name] = measure[name]()
        print(f"\n{getattr(suites, name).__doc__.strip()}\n\n{markdown(rows)}", flush=True)
        if OUTPUT.value:  # after each suite: an interrupted run keeps what it has
            Path(OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
            with replacing(OUTPUT.value) as temporary:
                temporary.write_text(json.dumps(result, indent=2) + "\n")


def markdown(rows):
    """Rows (dicts with the same keys) as a table; columns that are empty in all rows are left out."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    lines = [names, ["---"] * len(names), *([_shown(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


if __name__ == "__main__":
    cli.run(main)
