"""Classes and vectors of images, from the files to the batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.conditions import Conditions, dropped, none_like
from data.datasets import build_dataset
from data.datasets.prepared import write_prepared
from data.loader import all_batches, training_batches
from tests.data.layouts import config, write_folder, write_lsun
from utils.errors import UserError


def parity(index):
    return "odd" if index % 2 else "even"


def corner(index):
    return [index, index**2]


def wave(positions, index):
    return (positions[..., :1] + index % 7) / 8


@pytest.fixture
def by_class(tmp_path):
    """Config of 22 grey images in the folders a/b and c/d, whose value is 100 in the first and 200 in the second."""
    for folder, value, count in (("a/b", 100, 12), ("c/d", 200, 10)):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (value, value, i)).save(tmp_path / "images" / folder / f"{i:02d}.png")
    cfg = config("folder", tmp_path / "images")
    cfg.data.condition = "class"
    return cfg


@pytest.fixture
def with_vectors(tmp_path):
    """Config of 22 images, the vector of each being its mean colour."""
    names = write_folder(tmp_path / "images", 22, pattern="of/{:03d}.png")
    cfg = config("folder", tmp_path / "images")
    cfg.data.condition = "vector"
    vectors = {name: np.asarray(Image.open(tmp_path / "images" / name).resize((1, 1), Image.Resampling.BOX))[0, 0]
               for name in names}
    np.savez(tmp_path / "images" / "conditions.npz", **vectors)
    return cfg


def both(cfg):
    return build_dataset(cfg, True), build_dataset(cfg, False)


def check_classes(cfg):
    train, heldout = both(cfg)
    assert train.conditions == heldout.conditions == Conditions("class", 2, ["a/b", "c/d"])
    assert (len(train), len(heldout)) == (20, 2)
    assert heldout.condition_values.tolist() == [0, 1]  # 5 % of each class, in turn
    batch = next(training_batches(train, 20, seed=0))
    assert batch.condition.dtype == torch.int64
    assert torch.equal(batch.condition, (batch.images[:, 0, 8, 8] > 0).long())
    assert set(batch.condition.tolist()) == {0, 1}


def check_vectors(cfg):
    train, heldout = both(cfg)
    assert train.conditions[:2] == ("vector", 3)
    values = train.condition_values.double()
    torch.testing.assert_close(torch.tensor(train.conditions.mean).double(), values.mean(0))
    torch.testing.assert_close(torch.tensor(train.conditions.std).double(), values.std(0, correction=0))
    for dataset in (train, heldout):
        for batch in all_batches(dataset, 3):
            assert batch.condition.dtype == torch.float32
            torch.testing.assert_close(batch.condition / 127.5 - 1, batch.images.mean((2, 3)), atol=0.05, rtol=0)


def test_the_class_is_the_folder(by_class):
    check_classes(by_class)


def test_vectors_come_from_a_file(with_vectors):
    check_vectors(with_vectors)


@pytest.mark.parametrize("kind", ["class", "vector"])
def test_conditions_are_prepared_with_the_images(kind, tmp_path, request):
    cfg = request.getfixturevalue({"class": "by_class", "vector": "with_vectors"}[kind])
    write_prepared(*both(cfg), str(tmp_path / "lmdb"), 0)
    cfg.data.root_dir = str(tmp_path / "lmdb")
    {"class": check_classes, "vector": check_vectors}[kind](cfg)
    for other in {"none", "class", "vector"} - {kind}:
        cfg.data.condition = other
        if other == "none":
            assert build_dataset(cfg, True).conditions is None
        else:
            with pytest.raises(UserError, match=f"data.condition='{other}'.*was prepared with '{kind}'"):
                build_dataset(cfg, True)


def test_an_image_that_replaces_an_unreadable_one_keeps_its_own_condition(by_class, tmp_path):
    (tmp_path / "images" / "a/b/00.png").write_bytes(b"no image")
    train = build_dataset(by_class, True)
    with pytest.warns(UserWarning, match="00.png cannot be read"):
        batch = next(all_batches(train, 4))
    assert train.keys[:2] == ["a/b/00.png", "c/d/00.png"]
    assert (batch.images[:, 0, 8, 8] > 0).tolist() == [True, True, False, True]
    assert batch.condition.tolist() == [1, 1, 0, 1]


def test_functions_have_conditions_from_a_second_callable():
    cfg = config("function", channels=1)
    cfg.data.function, cfg.data.num_functions, cfg.data.num_heldout_functions = f"{__name__}:wave", 5, 2
    cfg.data.condition, cfg.data.condition_source = "class", f"{__name__}:parity"
    train, heldout = both(cfg)
    assert train.conditions == heldout.conditions == Conditions("class", 2, ["even", "odd"])
    assert train.condition_values.tolist() == [0, 1, 0, 1, 0] and heldout.condition_values.tolist() == [1, 0]
    cfg.data.condition, cfg.data.condition_source = "vector", f"{__name__}:corner"
    assert next(all_batches(build_dataset(cfg, False), 2)).condition.tolist() == [[5, 25], [6, 36]]
    for source, line in (("numpy:nowhere", "has no 'nowhere'"), ("math:sqrt", "must be vectors"),
                         ("math:log", "failed: ValueError"), (f"{__name__}:parity", "no vector of numbers")):
        cfg.data.condition_source = source
        with pytest.raises(UserError, match=f"data.condition_source='{source}'.*{line}"):
            build_dataset(cfg, True)
    cfg.data.condition, cfg.data.condition_source = "class", "operator:index"
    with pytest.raises(UserError, match="no training image is of the class '5'"):
        build_dataset(cfg, False)


def test_windows_have_their_picture_as_class():
    cfg = config("photos", img_size=32)
    cfg.data.condition = "class"
    dataset = build_dataset(cfg, False)
    part = dataset.of_class(dataset.conditions.names.index("coffee"))
    assert len(part) == 64 and {key[0] for key in part.keys} == {"coffee.png"}
    whole = [i for i, key in enumerate(dataset.keys) if key[0] == "coffee.png"]
    assert torch.equal(part[5], dataset[whole[5]]) and len({part.fingerprint(), dataset.fingerprint()}) == 2


def test_conditions_enter_the_fingerprint(with_vectors, tmp_path):
    before = build_dataset(with_vectors, True).fingerprint()
    path = tmp_path / "images" / "conditions.npz"
    with np.load(path) as archive:
        np.savez(path, **{name: archive[name] + 1.0 for name in archive.files})
    after = build_dataset(with_vectors, True).fingerprint()
    with_vectors.data.condition = "none"
    assert len({before, after, build_dataset(with_vectors, True).fingerprint()}) == 3


@pytest.mark.parametrize("change, line", [
    (lambda found: found.pop("of/003.png"), r"no vector named 'of/003.png' \(1 of 21 images lack one\)"),
    (lambda found: found.update({"of/003.png": np.zeros(4)}), r"'of/003.png' has the shape \[4\]; all must be vectors"),
    (lambda found: found.update({"of/003.png": np.full(3, np.nan)}), "'of/003.png' .* of 3 finite numbers"),
    (lambda found: found.update({"of/003.png": np.array(["red"])}), "'of/003.png' is no vector of numbers"),
    (lambda found: found.clear(), "no vector named 'of/000.png'"),
])
def test_bad_vectors_are_refused(with_vectors, tmp_path, change, line):
    path = tmp_path / "images" / "conditions.npz"
    found = dict(np.load(path))
    change(found)
    np.savez(path, **found)
    with pytest.raises(UserError, match=line):
        build_dataset(with_vectors, True)


@pytest.mark.parametrize("content, line", [(None, "it does not exist"), (b"text", "needs a readable")])
def test_a_bad_file_of_vectors_is_refused(with_vectors, tmp_path, content, line):
    path = tmp_path / "images" / "conditions.npz"
    path.write_bytes(content) if content else path.unlink()
    with pytest.raises(UserError, match=f"data.condition='vector'.*{line}"):
        build_dataset(with_vectors, True)


def test_bad_classes_are_refused(by_class, tmp_path):
    images = tmp_path / "images"
    (images / "empty").mkdir()
    with pytest.raises(UserError, match="data.condition='class', but the folder .*empty has no image"):
        build_dataset(by_class, True)
    (images / "empty").rename(images / ".hidden")
    (images / "a/b/00.png").rename(images / "00.png")
    with pytest.raises(UserError, match="1 images lie in .* itself; each class needs a folder"):
        build_dataset(by_class, True)
    (images / "one").mkdir()
    (images / "00.png").rename(images / "one/00.png")
    with pytest.raises(UserError, match="no image of 'one' is left to train on"):
        build_dataset(by_class, True)
    write_lsun(images, "train", 2)
    by_class.data.name = "churches"
    with pytest.raises(UserError, match="data.name='churches' have no classes"):
        build_dataset(by_class, True)


def test_parsing_what_a_flag_names(tmp_path):
    classes = Conditions("class", 3, ["cat", "dog", "0"])
    assert [classes.parse(text).tolist() for text in ("dog", "1", "0")] == [[1], [1], [2]]  # names come first
    for text, line in (("3", "none of the 3 classes"), ("cta", "did you mean cat"), ("-1", "such as cat, dog")):
        with pytest.raises(UserError, match=f"--condition={text} is .*{line}"):
            classes.parse(text)
    vectors, path = Conditions("vector", 2), str(tmp_path / "v.npy")
    for array, expected in (([1, 2], [[1, 2]]), ([[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [5, 6]])):
        np.save(path, array)
        assert vectors.parse(path).tolist() == expected
    for array in ([1, 2, 3], [[[1, 2]]], [1, np.inf]):
        np.save(path, array)
        with pytest.raises(UserError, match="rows of 2, all finite"):
            vectors.parse(path)
    with pytest.raises(UserError, match="not a readable .npy file"):
        vectors.parse(str(tmp_path / "w.npy"))


@pytest.mark.parametrize("condition", [torch.arange(1000), torch.arange(2000.0).view(1000, 2)])
def test_dropout_takes_conditions_away_whole(condition):
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    result = dropped(condition, uniform, 0.3)
    gone = torch.tensor([torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)) for a, b in
                         zip(result, none_like(condition), strict=True)])
    assert torch.equal(gone, uniform < 0.3) and torch.equal(result[~gone], condition[~gone])
    assert torch.equal(dropped(condition, uniform, 0.0), condition)
