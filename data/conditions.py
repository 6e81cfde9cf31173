"""Conditions of images: the class or the vector that a model is trained to follow (docs/conditions.md).

A batch of classes is int64 [B], of vectors float32 [B, D]. In it, −1 or NaN stands for no condition.
"""

import difflib
import os
import zipfile
from typing import NamedTuple

import numpy as np
import torch

from utils.errors import UserError

FILE = "conditions.npz"  # in data.root_dir, unless data.condition_source names another


class Conditions(NamedTuple):
    """All that a network depends on; a checkpoint records it.

    kind        "class" or "vector"
    size        number of classes, or length of a vector
    names       of the classes, by index; empty for vectors
    mean, std   of the training vectors in each dimension; empty for classes
    """

    kind: str
    size: int
    names: list = []
    mean: list = []
    std: list = []

    @classmethod
    def of_vectors(cls, values):
        """Of vectors float32 [N, D]."""
        std = values.double().std(0, correction=0)
        return cls("vector", values.shape[1], [], values.double().mean(0).tolist(),
                   torch.where(std > 0, std, 1).tolist())

    def same(self, other):
        """True if a condition of `other` means the same."""
        return other is not None and self[:3] == other[:3]

    def describe(self):
        """One line for messages."""
        return f"the classes {', '.join(self.names)}" if self.kind == "class" else f"vectors of {self.size} numbers"

    def parse(self, text, flag="condition"):
        """The conditions that the value of a flag names, for samples in turn: int64 [1] or float32 [N, D].

        A class is given by name or index, vectors by a .npy file of [D] or [N, D] numbers. UserError otherwise.
        """
        where = f"--{flag}={text}"
        if self.kind == "class":
            if text in self.names:
                return torch.tensor([self.names.index(text)])
            if text.isdecimal() and int(text) < self.size:
                return torch.tensor([int(text)])
            near = difflib.get_close_matches(text, self.names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f", such as {', '.join(self.names[:3])}"
            raise UserError(f"{where} is none of the {self.size} classes of the model{hint} (or give an index below "
                            f"{self.size})")
        try:
            values = torch.from_numpy(np.atleast_2d(np.load(text, allow_pickle=False))).float()
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise UserError(f"{where} is not a readable .npy file ({error}); give one of {self.size} numbers, or of "
                            "rows of as many") from error
        if values.dim() != 2 or values.shape[1] != self.size or not values.isfinite().all():
            raise UserError(f"{where} holds {list(values.shape)} numbers; the model takes rows of {self.size}, all "
                            "finite")
        return values


def none_like(condition):
    """No condition, for as many samples as a batch of conditions has."""
    return torch.full_like(condition, torch.nan if condition.is_floating_point() else -1)


def dropped(condition, uniform, probability):
    """The batch without the conditions of the samples whose number in `uniform` [B] is below the probability."""
    drop = (uniform < probability).view(-1, *[1] * (condition.dim() - 1))
    return torch.where(drop, none_like(condition), condition)


def class_indices(found, names, where):
    """int64 [N] of the class names `found` of N images. UserError if the training images lack one; where: of what."""
    places = {name: place for place, name in enumerate(names)}
    try:
        return torch.tensor([places[name] for name in found])
    except KeyError as error:
        raise UserError(f"{where}: no training image is of the class {error}, but a held-out one is; add some, or "
                        "remove those") from error


def as_vectors(named, where):
    """float32 [N, D] of (name, numbers) of N images. UserError for numbers that are no finite vectors of one length."""
    rows = []
    for name, numbers in named:
        try:
            row = torch.from_numpy(np.array(numbers, dtype=np.float32))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: the condition of {name!r} is no vector of numbers ({error})") from error
        length = len(rows[0]) if rows else row.numel()
        if row.shape != (length,) or not length or not row.isfinite().all():
            raise UserError(f"{where}: the condition of {name!r} has the shape {list(row.shape)}; all must be vectors "
                            f"of {length or 'some'} finite numbers")
        rows.append(row)
    return torch.stack(rows)


def read_vectors(path, names):
    """float32 [N, D]: the vectors of these names in an .npz file. UserError if one is missing, or of another length."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            known = set(archive.files)
            missing = [name for name in names if name not in known]
            if missing:
                raise UserError(f"{path} has no vector named {missing[0]!r} ({len(missing)} of {len(names)} images "
                                "lack one); names are paths relative to the folder of the images")
            return as_vectors(((name, archive[name]) for name in names), path)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        reason = "it does not exist" if not os.path.exists(path) else error
        raise UserError(f"data.condition='vector' needs a readable {path} with a vector for each image ({reason}); "
                        "make it with numpy.savez, or set data.condition_source") from error
