"""Check an installation on a GPU in a few minutes, and write a Markdown page to paste into an issue.

    python experiments/check_gpu.py --config configs/ffhq_256_config.py [--output gpu_check]

Runs, each as a command that the page shows: the quick tests of the networks and the diffusion process, which cover the
GPU where there is one; the training step of --config in time, memory and share of peak; a short training of the demo's
model on the GPU in its default precision and in float32, and on the CPU in float32, whose losses should agree; and
reconstructions by the first of them. A part that fails does not stop the others. Exit code 1 if one did.
"""

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from utils import cli, config
from utils.device import environment, resolve_device
from utils.files import check_writable, replacing
from utils.logging import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIG = config.define_config_flag("config", "autoencoder config whose training step is measured")
STEPS = flags.DEFINE_integer("steps", 500, "steps of each short training", lower_bound=50)
OUTPUT = flags.DEFINE_string("output", "gpu_check", "folder for the runs and the page, page.md")
PLOTTED = 50  # steps of one mean loss


def main():
    cfg = config.read_autoencoder_config(CONFIG)
    output = Path(OUTPUT.value).resolve()
    check_writable(output, f"--output={output}")
    device = resolve_device(cfg.run.device)
    runs = {"cpu": ["--config.run.device=cpu", "--config.train.precision=fp32"]}
    if device.type == "cuda":
        runs = {"gpu": [], "gpu_fp32": ["--config.train.precision=fp32"], **runs}
    demo = ["--config", "configs/demo_config.py", f"--config.run.output_dir={output}",
            f"--config.train.max_steps={STEPS.value}", f"--config.train.plot_graph_steps={PLOTTED}"]
    first = next(iter(runs))  # reconstructs
    parts = {
        "Tests": ["-m", "pytest", "-q", "-m", "not slow", "tests/models", "tests/diffusion"],
        "Training step": ["experiments/benchmark.py", *config_arguments(), "--suites", "training,parts"],
        **{f"Training, {name}": ["train_inf_ae_diffusion.py", *demo, f"--config.run.experiment={name}", *more]
           for name, more in runs.items()},
        "Reconstructions": ["experiments/generate_recons.py", *demo, f"--config.run.experiment={first}", *runs[first],
                            "--num_samples", "64", "--sampling_steps", "10", "--output", str(output / "recons")],
    }
    page, failed = [f"# {environment()['machine']}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"], []
    for name, arguments in parts.items():
        print(f"{name}: python {' '.join(arguments)}", flush=True)
        started = time.monotonic()
        ran = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if ran.returncode:
            failed.append(name)
        page += [f"## {name}: {'failed' if ran.returncode else 'ok'}, {time.monotonic() - started:.0f} s",
                 f"`python {' '.join(arguments)}`", f"```text\n{last_lines(ran.stdout.decode(errors='replace'))}\n```"]
        with replacing(output / "page.md") as temporary:  # after each part: an interrupted check keeps its results
            temporary.write_text("\n\n".join([*page, losses(output, runs)]) + "\n", encoding="utf-8")
    print(f"{len(parts) - len(failed)} of {len(parts)} parts are ok; the page is {output / 'page.md'}")
    if failed:
        sys.exit(1)


def config_arguments():
    """The arguments of this command that set the config, with their values: --config=x or --config x."""
    return [argument for before, argument in zip(sys.argv, sys.argv[1:], strict=False)
            if argument.startswith("--config") or before.startswith("--config") and "=" not in before]


def last_lines(text, count=40):
    """The last lines of a program's output; of a progress bar, its last state."""
    lines = [line.rstrip().split("\r")[-1] for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-count:])


def losses(output, runs):
    """A table of mean losses: a row for each PLOTTED steps, a column for each run."""
    columns = {name: {row["step"]: row["loss"] for row in read_metrics(output / name / "metrics.jsonl")
                      if "loss" in row} for name in runs}
    steps = sorted(set().union(*columns.values()))
    lines = [["step", *columns], ["---"] * (1 + len(columns)),
             *([str(step), *(f"{column[step]:.4f}" if step in column else "" for column in columns.values())]
               for step in steps)]
    return "\n".join(["## Losses\n", *(f"| {' | '.join(line)} |" for line in lines)])


if __name__ == "__main__":
    cli.run(main)
