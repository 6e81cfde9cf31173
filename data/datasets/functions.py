"""Functions over [0, 1]² as images of any resolution: a data set that evaluates a Python callable."""

import functools
import importlib
import traceback

import torch

from data.conditions import Conditions, as_vectors, class_indices
from data.coordinates import Coordinates
from data.datasets.base import ImageDataset
from utils.errors import UserError
from utils.images import to_uint8

PROBE = (6, 8)  # rows and columns of the positions at which a callable is tested before use
SAME = 1e-3  # largest difference between two evaluations of the same function
MOST = 10**8  # functions: the order of an epoch takes 8 bytes per function
ROUNDING = 1e-5  # by which values may leave [−1, 1]


class Functions(ImageDataset):
    """Functions f(positions, index) -> values, evaluated at the pixel centres of any size.

    path       data.function, the name of the callable (load_function). It takes positions, float32 [..., 2], (x, y) in
               [0, 1], and the index of a function, int. It returns values [..., C] in [−1, 1], as tensor or array.
               A value must depend on its own position and the index alone; draw random numbers from a generator that
               is seeded by the index.
    counts     number of training functions, of indices 0, 1, …, and of held-out ones, which follow them

    Raises UserError for a callable that breaks these rules: before training if function 0 shows it.
    """

    name = "function"
    sampled = 4  # a function may be slow
    flips = False  # the mirror image of a function may not belong to the distribution

    def __init__(self, path, counts, train, size, channels):
        super().__init__(path, train, size, channels)
        if sum(counts) > MOST:
            raise UserError(f"data.num_functions={counts[0]} and data.num_heldout_functions={counts[1]} are more than "
                            f"{MOST} together; lower them")
        self._training = range(counts[0])
        self.keys = self._training if train else range(counts[0], sum(counts))
        _check_function(path, self.keys[0], channels)

    def with_condition(self, index):
        """Function `index` as `exact`, and its condition."""
        return self.exact(index), self.condition(index)

    def exact(self, index):
        """Function `index` as float32 [C, H, W] in [−1, 1]."""
        return evaluate(self.root, pixel_centres(self.size), self.keys[index], self.channels).permute(2, 0, 1)

    def add_conditions(self, kind, source):
        """Conditions from the callable `source`: index -> name of a class, or vector. UserError if it fails."""
        where = f"data.condition_source={source!r}"
        label = load_function(source, "data.condition_source")

        def labels(indices):
            try:
                return [label(index) for index in indices]
            except Exception as error:  # user code may raise anything
                raise UserError(f"{where} failed: {_told(error)}") from error

        if kind == "class":
            names = sorted(set(map(str, labels(self._training))))
            self.conditions = Conditions("class", len(names), names)
            self.condition_values = class_indices(map(str, labels(self.keys)), names, where)
        else:
            self.condition_values = as_vectors(zip(self.keys, labels(self.keys), strict=True), where)
            self.conditions = Conditions.of_vectors(self.condition_values)

    def read(self, index):
        """Function `index` as uint8 [C, H, W]."""
        return to_uint8(self.exact(index))

    def source_size(self, index):
        """(H, W) of the items: functions have no resolution of their own."""
        return self.size

    def notes(self):
        """Nothing: functions are neither left out nor altered."""
        return ()

    def label(self, index):
        """Name of function `index` in messages."""
        return f"function {self.keys[index]}"

    def _version(self):
        return (self.root,)

    def _content(self, index):
        """Values of function `index`: they detect changes in any code that the callable uses."""
        return evaluate(self.root, pixel_centres(PROBE), self.keys[index], self.channels).numpy().tobytes()


def pixel_centres(size):
    """Positions of the pixels of an H×W image, float32 [H, W, 2], (x, y) in [0, 1] (docs/method.md, 1.1)."""
    return Coordinates.full(1, size).positions[0].unflatten(0, size).clone()


@functools.cache
def load_function(path, field="data.function"):
    """The callable at "module:attribute" or "package.module.attribute". The module is imported, so its code runs.

    field   the field or flag that holds the path, for messages
    Raises UserError if there is no such callable.
    """
    where = f"{field}={path!r}"
    module, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module or not attribute:
        raise UserError(f"{where} must be module:attribute, the name of a callable such as "
                        "data.random_fields:gaussian_field")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise UserError(f"{where}: the module {module!r} cannot be imported ({_told(error)}); give one that is "
                        "installed or below a folder of PYTHONPATH") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UserError(f"{where}: {module!r} has no {name!r}; give module:attribute")
        found = getattr(found, name)
    if not callable(found):
        raise UserError(f"{where} is of type {type(found).__name__}; it must be a callable")
    return found


@torch.no_grad()
def evaluate(path, positions, index, channels):
    """Values float32 [..., C] on the CPU of function `index` at positions [..., 2]; UserError for any other outcome."""
    function, where = load_function(path), f"data.function={path!r}"
    try:
        values = function(positions, index)
        values = torch.as_tensor(values).cpu()
    except Exception as error:  # user code may raise anything
        raise UserError(f"{where} failed for function {index}: {_told(error)}") from error
    expected = (*positions.shape[:-1], channels)
    if values.shape != expected or values.is_complex():
        raise UserError(f"{where} returned {values.dtype} {list(values.shape)} for positions {list(positions.shape)}; "
                        f"it must return real values {list(expected)}, the last dimension being data.channels")
    values = values.float()
    if not values.isfinite().all():
        raise UserError(f"{where} returned values that are not finite for function {index}; correct it")
    largest = values.abs().max().item()
    if largest > 1 + ROUNDING:
        raise UserError(f"{where} returned a value of magnitude {largest:.4g} for function {index}; all must lie in "
                        "[-1, 1], so scale or clip them")
    return values.clamp(-1, 1)


def _check_function(path, index, channels):
    """UserError if values depend on more than their own position and the index."""
    def values(rows, columns):
        return evaluate(path, pixel_centres(PROBE)[rows, columns].contiguous(), index, channels)

    everywhere, part = slice(None), (slice(1, 4), slice(2, 7))
    first = values(everywhere, everywhere)
    for again, wanted, reason in (
            (values(everywhere, everywhere), first, "when called again; draw from a generator seeded by the index"),
            (values(*part), first[part], "when given fewer positions; a value must depend on its own position alone")):
        if (again - wanted).abs().max() > SAME:
            raise UserError(f"data.function={path!r} returned other values for function {index} {reason}")


def _told(error):
    """The error and its place, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}, {frame.filename}:{frame.lineno}"
