"""The checkpoints of one run: the newest, some before it, and the best; written while training goes on."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from utils.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint


class CheckpointFolder:
    """<name>.pt in `folder`, the newest state of a run; <name>.<step>.pt, those before it; best_<name>.pt, the best.

    filename    <name>.pt
    keep        how many states there are at most, the newest included and the best not

    A file appears whole, under its name, or not at all, and one is removed only when newer ones are on the disk: a
    process that is killed at any instant leaves a state to go on from.
    Saving copies a state to the memory of the host, and a thread writes it. What goes wrong there is raised by the next
    call.
    """

    def __init__(self, folder, filename, keep):
        self.newest = Path(folder) / filename
        self.best = self.newest.with_name(f"best_{filename}")
        self.keep = keep
        self._step = None  # of the file `newest`; None where there is none, or a damaged one
        self._thread = ThreadPoolExecutor(max_workers=1)  # Python ends only when what was given to it is done
        self._writing = None

    def exists(self):
        """Whether there is a state to go on from, if it is not damaged."""
        return self.newest.exists() or bool(older_checkpoints(self.newest))

    def load(self, kind):
        """(newest state that is whole, its path); see load_newest."""
        state, path = load_newest(self.newest, kind)
        self._step = state["step"] if path == self.newest else None
        return state, path

    def save(self, state):
        """Start to write a state, a dict with "step", as the newest one."""
        self._start(self._write, state)

    def save_best(self, state):
        """Start to write the best state."""
        self._start(save_checkpoint, self.best, state)

    def check(self):
        """Raise the OSError of a write that has failed; does not wait for one that has not ended."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self):
        """Return when all is on the disk. OSError where it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _start(self, write, *arguments):
        self.wait()
        self._writing = self._thread.submit(write, *to_host(arguments))

    def _write(self, state):
        step, before = state["step"], self._step
        displaced = None
        if self.keep > 1 and before not in (None, step):
            displaced = self.newest.with_name(f"{self.newest.stem}.{before}{self.newest.suffix}")
        save_checkpoint(self.newest, state, displaced)
        self._step = step
        older = older_checkpoints(self.newest)
        # one of a later step is of a future that this run, having gone back, has left
        kept = [s for s in older if s < step][:self.keep - 1]
        for path in (older[s] for s in older if s not in kept):
            path.unlink(missing_ok=True)


def older_checkpoints(newest):
    """{step: path} of the states before the file `newest`, the latest first; it need not exist."""
    pattern = re.compile(rf"{re.escape(newest.stem)}\.(\d+){re.escape(newest.suffix)}")
    found = {int(match[1]): path for path in newest.parent.glob(f"{newest.stem}.*{newest.suffix}")
             if (match := pattern.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def load_newest(newest, kind):
    """(state, path) of the file `newest` or, with a warning, of the latest one before it where that is damaged or gone.

    UserError where there is none that is whole, or where it is of another kind (see load_checkpoint).
    """
    problem, older = None, older_checkpoints(newest)
    for path in [newest, *older.values()]:
        if path == newest and not path.exists() and older:
            problem = DamagedCheckpoint(f"{newest} is missing")
            continue
        try:
            state = load_checkpoint(path, kind)
        except DamagedCheckpoint as error:
            problem = problem or error
            continue
        if problem is not None:
            logging.warning("%s; the one before it is used, %s of step %d", problem.what, path, state["step"])
        return state, path
    if older:
        names = " or ".join(path.name for path in older.values())
        raise DamagedCheckpoint(f"{problem.what}, and neither can {names} be read") from problem
    raise problem


def to_host(value):
    """A copy of nested dicts, lists and tuples, with the tensors in them in the memory of the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_host, value))
    return value
