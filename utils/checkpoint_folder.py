"""The checkpoints of one run: the newest and the best."""

from pathlib import Path

from utils.checkpoint import load_checkpoint, save_checkpoint


class CheckpointFolder:
    """<folder>/<filename>, the newest state of a run, and <folder>/best_<filename>, its best one."""

    def __init__(self, folder, filename):
        self.newest = Path(folder) / filename
        self.best = self.newest.with_name(f"best_{filename}")

    def exists(self):
        """Whether there is a checkpoint to go on from."""
        return self.newest.exists()

    def load(self, kind):
        """The newest state; UserError where it is damaged or of another kind."""
        return load_checkpoint(self.newest, kind)

    def load_best(self, kind):
        """The best state, or None."""
        return load_checkpoint(self.best, kind) if self.best.exists() else None

    def save(self, state):
        """Write the newest state. OSError where the disk is full or the folder not writable."""
        save_checkpoint(self.newest, state)

    def save_best(self, state):
        """Write the best state."""
        save_checkpoint(self.best, state)
