"""Functions as a data set: one function at every size, and one line for a callable that is no such function."""

import math
import pickle
import sys

import pytest
import torch

from data.datasets import build_dataset
from data.datasets.functions import load_function
from data.loader import all_batches, training_batches
from tests.data.layouts import config
from utils.errors import UserError

MODULE = '''
import numpy as np, torch

def wave(positions, index):
    x, y = positions.unbind(-1)
    return torch.stack([torch.sin(3 * x + index), x * y, y - 0.5], dim=-1)

def drawn(positions, index):
    return torch.full((*positions.shape[:-1], 3), index / 100) + 0.3 * positions[..., :1]

def moving(positions, index):
    return wave(positions / 2, index)

class Sum:
    def __call__(self, positions, index):
        return np.stack([positions[..., 0] * positions[..., 1]] * 3, axis=-1)

product = Sum()
number = 3
answers = iter(range(1000))
BAD = {
    "flat": lambda p, i: p[..., 0],
    "grey": lambda p, i: p[..., :1],
    "first": lambda p, i: wave(p, i).permute(2, 0, 1),
    "none": lambda p, i: None,
    "complex": lambda p, i: wave(p, i) * 1j,
    "nan": lambda p, i: wave(p, i) / 0 * 0,
    "large": lambda p, i: 1.5 * wave(p, i),
    "raises": lambda p, i: p.nothing,
    "arguments": lambda p: p,
    "noise": lambda p, i: torch.rand(*p.shape[:-1], 3),
    "counted": lambda p, i: wave(p, next(answers)),
    "mean": lambda p, i: wave(p, i) - 0.5 * wave(p, i).mean(),
}
globals().update(BAD)
'''


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """name of an attribute of a module on the path -> config of the data set of that callable."""
    (tmp_path / "some_functions.py").write_text(MODULE)
    (tmp_path / "broken_functions.py").write_text("print(\n")
    (tmp_path / "leaving_functions.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def make(attribute, path="some_functions:{}", img_size=16):
        cfg = config("function", img_size=img_size)
        cfg.data.function = path.format(attribute)
        cfg.data.num_functions, cfg.data.num_heldout_functions = 20, 5
        return cfg
    yield make
    sys.modules.pop("some_functions", None)
    load_function.cache_clear()


def test_items_are_values_at_pixel_centres_and_parts_have_their_own_indices(functions):
    train, heldout = (build_dataset(functions("wave"), part, (9, 12)) for part in (True, False))
    assert (len(train), len(heldout)) == (20, 5)
    for dataset, item, index in ((train, 4, 4), (heldout, 0, 20), (heldout, 4, 24)):
        values = dataset.exact(item)
        assert values.shape == (3, 9, 12) and values.dtype == torch.float32
        for row, column in ((0, 0), (8, 11), (3, 5)):
            x, y = (column + 0.5) / 12, (row + 0.5) / 9
            wanted = [math.sin(3 * x + index), x * y, y - 0.5]
            assert values[:, row, column].tolist() == pytest.approx(wanted, abs=1e-5)
        assert dataset[item].dtype == torch.uint8
        assert (dataset[item] / 127.5 - 1 - values).abs().max() < 0.5001 / 127.5
    with pytest.raises(IndexError):
        train[20]


@pytest.mark.parametrize("name, path", [("wave", "some_functions:{}"), ("gaussian_field", "data.random_fields:{}")])
def test_an_item_is_the_same_function_at_every_size(functions, name, path):
    """Of three times as many pixels, every third has its centre where the coarser pixel has."""
    cfg = functions(name, path)
    cfg.data.channels = 1 if name == "gaussian_field" else 3
    coarse, fine = build_dataset(cfg, False, (10, 16)), build_dataset(cfg, False, (30, 48))
    for item in range(len(coarse)):
        torch.testing.assert_close(fine.exact(item)[:, 1::3, 1::3], coarse.exact(item), atol=2e-5, rtol=0)
        assert not torch.equal(coarse.exact(item), coarse.exact(item - 1 if item else 4))


def test_arrays_objects_and_dots_will_do(functions):
    item = build_dataset(functions("product"), True).exact(0)
    assert item[1, 3, 5].item() == pytest.approx(3.5 * 5.5 / 256)
    dotted = build_dataset(functions("wave", "some_functions.{}"), True)
    assert torch.equal(dotted.exact(7), build_dataset(functions("wave"), True).exact(7))


def test_models_see_exact_values_and_no_mirror_images(functions):
    train = build_dataset(functions("drawn"), True)
    batch = next(training_batches(train, 20, seed=0))
    assert batch.images.dtype == torch.float32 and (batch.images.diff(dim=-1) > 0).all()  # drawn rises along x
    found = sorted(batch.images[:, 0, 0, 0].tolist())
    assert found == pytest.approx([i / 100 + 0.3 * 0.5 / 16 for i in range(20)], abs=1e-6)
    part = torch.utils.data.Subset(train, [3, 8])
    images, *_ = next(all_batches(part, 2, num_workers=1))
    assert torch.equal(images, torch.stack([train.exact(3), train.exact(8)]))


def test_pickling_and_fingerprint(functions):
    dataset = build_dataset(functions("wave"), True)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3], dataset[3])
    keys = [build_dataset(functions(name), part).fingerprint() for name in ("wave", "moving") for part in (True, False)]
    assert len(set(keys)) == 4 and keys[0] == dataset.fingerprint()


def test_the_fingerprint_follows_the_values(functions, monkeypatch):
    import some_functions
    before = build_dataset(functions("wave"), True).fingerprint()
    monkeypatch.setattr(some_functions, "wave", some_functions.drawn)
    load_function.cache_clear()
    assert build_dataset(functions("wave"), True).fingerprint() != before


# What data.function is, and what the one line must say.
MISTAKES = [
    ("", "must be module:attribute"),
    ("wave", "must be module:attribute"),
    ("some_functions:", "must be module:attribute"),
    ("no_such_module:f", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module'"),
    ("/tmp/some_functions.py:wave", "cannot be imported (ModuleNotFoundError"),
    (".some_functions:wave", "cannot be imported (TypeError"),
    ("broken_functions:f", "cannot be imported (SyntaxError"),
    ("leaving_functions:f", "cannot be imported (SystemExit"),
    ("some_functions:Sum.nothing", "has no 'nothing'"),
    ("some_functions:number", "is of type int; it must be a callable"),
    ("some_functions:flat", "returned torch.float32 [6, 8] for positions [6, 8, 2]; it must return real"),
    ("some_functions:grey", "real values [6, 8, 3], the last dimension being data.channels"),
    ("some_functions:first", "returned torch.float32 [3, 6, 8]"),
    ("some_functions:none", "failed for function 0: RuntimeError: Could not infer dtype of NoneType"),
    ("some_functions:complex", "returned torch.complex64"),
    ("some_functions:nan", "not finite for function 0"),
    ("some_functions:large", "returned a value of magnitude 1.4"),
    ("some_functions:raises", "failed for function 0: AttributeError: 'Tensor' object has no attribute 'nothing', "),
    ("some_functions:arguments", "failed for function 0: TypeError"),
    ("some_functions:noise", "returned other values for function 0 when called again"),
    ("some_functions:counted", "returned other values for function 0 when called again"),
    ("some_functions:mean", "returned other values for function 0 when given fewer positions"),
]


@pytest.mark.parametrize("path, said", MISTAKES, ids=[row[0] or "nothing" for row in MISTAKES])
def test_a_callable_that_is_no_function(functions, path, said):
    with pytest.raises(UserError) as error:
        build_dataset(functions("", path), True)
    message = str(error.value)
    assert f"data.function={path!r}" in message and said in message


def test_a_function_that_breaks_later_names_its_index(functions, monkeypatch):
    import some_functions
    monkeypatch.setattr(some_functions, "drawn", lambda p, i: some_functions.wave(p, i) * (2 if i == 13 else 1))
    dataset = build_dataset(functions("drawn"), True)
    with pytest.raises(UserError, match="for function 13; all must lie in"):
        list(dataset)
