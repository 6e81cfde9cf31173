"""Metrics and images of a run: metrics.jsonl, images/, and wandb if asked for."""

import functools
import hashlib
import json
import logging
import math
import os
import re
import statistics
from pathlib import Path

from utils import distributed
from utils.errors import UserError
from utils.files import TEXT, replacing
from utils.images import save_png


class RunLog:
    """The log of one run folder, written by the main rank alone.

    step    step that the run continues from; later lines are dropped, because the run will write them again
    """

    def __init__(self, folder, config, step=0):
        self.folder = Path(folder)
        self.metrics = self.folder / "metrics.jsonl"
        self.writes, self.wandb = distributed.is_main(), None
        if not self.writes:
            return
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        self.lines = [line for line in read_metrics(self.metrics) if line["step"] <= step]
        with replacing(self.metrics) as temporary, open(temporary, "w", encoding="utf-8") as file:
            _write(file, self.lines)
        self.wandb = _start_wandb(config)

    def numbers(self, step, values):
        """Append a line of floats. It is on disk on return, so that no checkpoint is ahead of its lines."""
        if not self.writes:
            return
        self.lines.append({"step": step, **values})
        with open(self.metrics, "a", encoding="utf-8") as file:
            _write(file, self.lines[-1:])
        if self.wandb:
            self.wandb.log(values, step=step)

    def smallest(self, name, first=0):
        """The smallest value of a metric from step `first` until now, NaN ignored; infinity if there is none."""
        return min((line[name] for line in self.lines if line["step"] >= first and not math.isnan(
            line.get(name, math.nan))), default=math.inf)

    def picture(self, step, name, image):
        """Write one uint8 image [C, H, W] to images/<name>_<step>.png."""
        if not self.writes:
            return
        path = self.folder / "images" / f"{name}_{step:07d}.png"
        save_png(image, path)
        if self.wandb:
            import wandb
            self.wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self):
        if self.wandb:
            self.wandb.finish()


def _write(file, lines):
    """Write lines and flush them to disk."""
    file.writelines(json.dumps(line) + "\n" for line in lines)
    file.flush()
    os.fsync(file.fileno())


def read_metrics(path):
    """Lines of a metrics.jsonl as dicts, [] if there is none.

    UserError naming the first line that is not readable. A last line that a kill cut short is left out with a warning:
    its step comes after the newest checkpoint, and will be logged again.
    """
    path = Path(path)
    lines = path.read_text(encoding=TEXT, errors="replace").splitlines(True) if path.exists() else []
    result = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if not isinstance(values.get("step"), int) or not all(isinstance(x, (int, float)) for x in values.values()):
                raise ValueError
        except (ValueError, AttributeError):
            if line.endswith("\n"):
                raise UserError(f"{path}, line {number} is not a line of metrics, such as {{\"step\": 100, \"loss\": "
                                "0.5}; repair or remove it") from None
            _warn(f"{path}, line {number} was cut short and is left out")
        else:
            result.append(values)
    return result


@functools.cache  # once per line
def _warn(message):
    logging.warning(message)


def evaluated(folder, step):
    """True if the metrics of a run folder hold the line that ends the evaluation of a step. Only lines of training
    have "seconds"."""
    return any(line["step"] == step and "seconds" not in line for line in read_metrics(Path(folder) / "metrics.jsonl"))


def check_wandb(run):
    """UserError if run.wandb_mode is online and nobody is logged in; wandb itself would wait for a key."""
    if run.wandb_mode == "online":
        import wandb
        if not wandb.login(prompt=False, verify=False):
            raise UserError("run.wandb_mode='online' but no wandb login was found; run `wandb login` first, "
                            "or set run.wandb_mode to offline or disabled")


def _start_wandb(config):
    run = config.run
    if run.wandb_mode == "disabled":
        return None
    check_wandb(run)
    import wandb  # slow to import, and most runs do not use it
    return wandb.init(project=wandb_name(run.name), name=run.experiment, id=wandb_name(run.experiment), resume="allow",
                      dir=run.wandb_dir, mode=run.wandb_mode, config=config.to_dict())


def wandb_name(name):
    """A name that wandb accepts as a project or run id: other characters become "-", and a digest keeps it unique."""
    allowed = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)
    if allowed == name.replace("/", "-") and len(allowed) <= 128:
        return allowed
    return f"{allowed[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def training_seconds(metrics):
    """Seconds of training, without evaluation, up to the last of the lines of read_metrics."""
    return max((line["seconds"] for line in metrics if "seconds" in line), default=0.0)


def seconds_per_step(metrics):
    """Median over the intervals between log lines, which ignores compilation and evaluation; NaN without intervals."""
    lines = [line for line in metrics if "seconds" in line]
    return statistics.median([(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in
                              zip(lines, lines[1:], strict=False) if b["seconds"] > a["seconds"]] or [math.nan])
