"""Every data set on a tiny copy of its layout: which files, which split, which faults."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import build_dataset, log_images
from data.datasets import lmdb as lmdb_reader
from tests.data.layouts import config, picture, write_folder, write_lsun
from tests.scripts import only_line, run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file
from utils.errors import UserError


def expected(i, width=20, height=20):
    return torch.from_numpy(np.array(picture(i, width, height))).permute(2, 0, 1)


LAYOUTS = {
    "folder": lambda root: write_folder(root, 45, "sub{0}/{0:03d}.png"),
    "ffhq": lambda root: write_folder(root, 45, "00000/{:05d}.png"),
    "celeba": lambda root: write_folder(root, 45, "20/{:05d}.png"),
    "churches": lambda root: (write_lsun(root, "train", 43), write_lsun(root, "val", 2)),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    LAYOUTS[request.param](tmp_path)
    return config(request.param, tmp_path)


def test_both_parts_of_every_layout(layout):
    train, held_out = build_dataset(layout, True), build_dataset(layout, False)
    assert (len(train), len(held_out)) == (43, 2)
    for dataset in (train, held_out):
        items = [dataset[i] for i in range(len(dataset))]
        assert all(item.shape == (3, 16, 16) and item.dtype == torch.uint8 for item in items)
        assert len({item.numpy().tobytes() for item in items}) == len(dataset)
        assert len(list(dataset)) == len(dataset)
        assert "\n" not in dataset.describe() and "16x16" in dataset.describe()
    assert train.fingerprint() != held_out.fingerprint()


def test_size_and_channels(layout):
    assert build_dataset(layout, True, 8)[0].shape == (3, 8, 8)
    assert build_dataset(layout, True, (10, 14))[0].shape == (3, 10, 14)
    layout.data.channels = 1
    assert build_dataset(layout, True)[0].shape == (1, 16, 16)


def test_a_fingerprint_identifies_the_images_and_not_their_place(layout, tmp_path):
    key = build_dataset(layout, True).fingerprint()
    assert len(key) == 32 and key != build_dataset(layout, True, 8).fingerprint()
    shutil.copytree(layout.data.root_dir, tmp_path / "copy")  # with new dates
    copy = layout.copy_and_resolve_references()
    copy.data.root_dir = str(tmp_path / "copy")
    assert build_dataset(copy, True).fingerprint() == key
    copy.data.channels = 1
    assert build_dataset(copy, True).fingerprint() != key


@pytest.mark.parametrize("change", ["content", "name", "one more"])
def test_a_fingerprint_changes_with_the_files(tmp_path, change):
    names = write_folder(tmp_path, 3)
    key = build_dataset(config("folder", tmp_path), True).fingerprint()
    if change == "name":
        (tmp_path / names[0]).rename(tmp_path / "other.png")
    elif change == "one more":
        picture(9).save(tmp_path / "00000_.png")
    else:
        content = (tmp_path / names[0]).read_bytes()
        (tmp_path / names[0]).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    assert build_dataset(config("folder", tmp_path), True).fingerprint() != key


def test_a_data_set_survives_pickling(layout):
    dataset = build_dataset(layout, False)
    first = dataset[0]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0], first)


def test_folder_reads_pixels_in_sorted_order_and_holds_out_the_last(tmp_path):
    write_folder(tmp_path, 3)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._00000.png").write_text("what macOS leaves behind")
    cfg = config("folder", tmp_path, 20)
    assert torch.equal(torch.stack(list(build_dataset(cfg, True))), torch.stack([expected(0), expected(1)]))
    assert torch.equal(build_dataset(cfg, False)[0], expected(2))


def test_ffhq_passes_over_other_kinds_of_files(tmp_path):
    write_folder(tmp_path, 20)
    write_folder(tmp_path / "thumbnails", 9, "{}.jpg")
    assert len(build_dataset(config("ffhq", tmp_path), True)) == 19


@pytest.mark.parametrize("size, folder", [(64, "thumbnails128x128"), (200, "images1024x1024")])
def test_ffhq_reads_one_folder_of_the_whole_download(tmp_path, size, folder):
    for name in ("images1024x1024/00000", "thumbnails128x128/00000", "in-the-wild-images/00000"):
        write_folder(tmp_path / name, 3)
    dataset = build_dataset(config("ffhq", tmp_path, size), True)
    assert len(dataset) == 2 and dataset.folder == str(tmp_path / folder)
    with pytest.raises(UserError, match="data.img_size=1025 is more than the 1024"):
        build_dataset(config("ffhq", tmp_path, 1025), True)


def test_every_image_is_accounted_for(tmp_path, caplog):
    write_folder(tmp_path, 40)
    picture(0, 12, 30).save(tmp_path / "00003.png")
    picture(1).convert("RGBA").save(tmp_path / "00004.png")
    (tmp_path / "film.gif").touch()
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    cfg = config("folder", tmp_path)
    caplog.set_level("INFO")
    log_images(build_dataset(cfg, True), build_dataset(cfg, False))
    assert "\n".join(caplog.messages).splitlines() == [
        f"folder: 38 training images of 16x16, 3 channels, {tmp_path}",
        "  left out: 1 .gif files, 1 links that lead nowhere",
        "  only 38 images to train on: with fewer than 200 in all, expect copies of them, or blur",
        "  1 of 38 examined images are smaller than 16x16: enlarged",
        "  1 of 38 examined images have an alpha channel: composited on white (data.background)",
        f"folder: 2 held-out images of 16x16, 3 channels, {tmp_path}",
        "  left out: 1 .gif files, 1 links that lead nowhere"]


def test_how_deep_and_transparent_pixels_are_read_is_configured(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((16, 16), 1000, dtype=np.uint16)).save(tmp_path / f"{i}.png")
    cfg = config("folder", tmp_path)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="none of the training images"):
        build_dataset(cfg, True)[0]
    cfg.data.white_level = 2000.0
    assert (build_dataset(cfg, True)[0] == 128).all()
    Image.new("RGBA", (16, 16)).save(tmp_path / "0.png")
    key = build_dataset(cfg, True).fingerprint()
    assert (build_dataset(cfg, True)[0] == 255).all()
    cfg.data.background = "black"
    assert (build_dataset(cfg, True)[0] == 0).all() and build_dataset(cfg, True).fingerprint() != key
    cfg.data.background = "blackish"
    with pytest.raises(UserError, match="data.background='blackish' is not a colour"):
        build_dataset(cfg, True)


def test_celeba_takes_the_smallest_folder_that_is_large_enough(tmp_path):
    for side in (8, 20, 40):
        write_folder(tmp_path / str(side), 4, width=side, height=side)
    assert torch.equal(build_dataset(config("celeba", tmp_path, 20), True)[0], expected(0))
    assert build_dataset(config("celeba", tmp_path, 32), True).folder.endswith("40")
    with pytest.raises(UserError, match="data.img_size=64 is more than the 40"):
        build_dataset(config("celeba", tmp_path, 64), True)


def test_celeba_split_file(tmp_path):
    names = write_folder(tmp_path, 5)
    cfg = config("celeba", tmp_path, 20)
    assert torch.equal(build_dataset(cfg, False)[0], expected(4))
    split = json.dumps({"train": [names[4], names[1]], "val": [names[0]]}, indent=1)
    (tmp_path / "split.json").write_bytes(b"\xef\xbb\xbf" + split.replace("\n", "\r\n").encode())  # as on Windows
    assert torch.equal(torch.stack(list(build_dataset(cfg, True))), torch.stack([expected(1), expected(4)]))
    assert torch.equal(torch.stack(list(build_dataset(cfg, False))), expected(0)[None])


@pytest.mark.parametrize("split", [
    "{", "[]", '{"train": ["00000.png"]}', '{"train": [], "val": ["00000.png"]}',
    '{"train": [1], "val": ["00000.png"]}',
    '{"train": ["00000.png"], "val": ["00000.png"]}', '{"train": ["00000.png"], "val": ["missing.png"]}'])
def test_celeba_refuses_a_bad_split_file(tmp_path, split):
    write_folder(tmp_path, 3)
    (tmp_path / "split.json").write_text(split)
    with pytest.raises(UserError, match="split.json"):
        build_dataset(config("celeba", tmp_path), True)


@pytest.mark.parametrize("suffix", ["webp", "jpeg", "png"])
def test_churches_crop_the_centre_whatever_the_encoding(tmp_path, suffix):
    write_lsun(tmp_path, "train", 1, suffix)
    image = build_dataset(config("churches", tmp_path, 20), True)[0]
    wanted = expected(0, 30, 20)[:, :, 5:25]
    assert (image.int() - wanted.int()).abs().float().mean() < (10 if suffix == "jpeg" else 1e-9)


def break_file(path, how):
    if how == "text":
        path.write_text("<html>404</html>")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:60])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["text", "cut", "gone"])
def test_the_next_readable_image_stands_in_for_a_bad_one(tmp_path, how):
    names = write_folder(tmp_path, 4)
    dataset = build_dataset(config("folder", tmp_path, 20), True)
    break_file(tmp_path / names[2], how)
    with pytest.warns(UserWarning, match=names[2]):
        assert torch.equal(dataset[2], expected(0))  # the training part ends with 2: round to the start
    assert torch.equal(dataset[1], expected(1))


def test_more_than_one_percent_of_bad_images_is_too_much(tmp_path):
    names = write_folder(tmp_path, 21)
    dataset = build_dataset(config("folder", tmp_path), True)
    for name in names[:2]:
        break_file(tmp_path / name, "text")
    with pytest.warns(UserWarning):
        dataset[1]
    dataset[1]  # the same one counts once
    with pytest.raises(UserError, match="2 of 20 training images cannot be read, for example 00000.png"):
        dataset[0]


def test_a_users_mistake_is_not_taken_for_a_bad_image(tmp_path, monkeypatch):
    write_folder(tmp_path, 4)
    dataset = build_dataset(config("folder", tmp_path), True)

    def fail(key):
        raise UserError("the disk is gone")

    monkeypatch.setattr(dataset, "_open", fail)
    with pytest.raises(UserError, match="the disk is gone"):
        dataset[0]


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut"])
def test_a_damaged_lmdb_is_a_users_matter(tmp_path, damage):
    write_lsun(tmp_path, "train", 30)
    file = tmp_path / "church_outdoor_train_lmdb" / "data.mdb"
    content = file.read_bytes()
    file.write_bytes({"garbage": b"garbage" * 1000, "empty": b"", "cut": content[:len(content) // 2]}[damage])
    with pytest.raises(UserError, match="not an intact LMDB"):
        build_dataset(config("churches", tmp_path), True)


def test_an_lmdb_can_be_read_again_after_it_was_replaced(tmp_path):
    write_lsun(tmp_path / "a", "train", 3)
    write_lsun(tmp_path / "b", "train", 5)
    assert len(build_dataset(config("churches", tmp_path / "a"), True)) == 3
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(tmp_path / "b", tmp_path / "a")
    assert len(build_dataset(config("churches", tmp_path / "a"), True)) == 5


def test_a_forked_worker_can_read_what_its_parent_has_open(tmp_path):
    write_lsun(tmp_path, "train", 3)
    dataset = build_dataset(config("churches", tmp_path), True)
    here = dataset[1]
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            inherited = bytes([len(lmdb_reader._environments)])  # py-lmdb forbids the use of these
            os.write(write_end, inherited + dataset[1].numpy().tobytes())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as stream:
        assert stream.read() == b"\0" + here.numpy().tobytes()
    assert torch.equal(dataset[1], here)


@pytest.mark.slow
def test_a_run_continues_on_the_same_data_elsewhere_and_refuses_others(tmp_path, caplog):
    write_folder(tmp_path / "data", 22)
    ae = write_config_file(tiny_config(tmp_path, tmp_path / "data", "folder"), tmp_path / "ae.py")
    latent = write_config_file(tiny_latent_config(tmp_path), tmp_path / "latent.py")
    for script, command, field in (("train_inf_ae_diffusion.py", ["--config", ae], "--config"),
                                   ("train_latent_diffusion.py", ["--config", latent, "--decoder_config", ae],
                                    "--decoder_config")):
        assert run_script(script, *command).code == 0
        command = [*command, f"{field}.data.root_dir={tmp_path / 'copy'}", "--config.train.max_steps=5"]
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        assert run_script(script, *command).code == 0
        picture(99).save(tmp_path / "copy" / "00003.png")
        command[-1] = "--config.train.max_steps=6"
        assert "was trained on other data" in only_line(run_script(script, *command))
        done = run_script(script, *command, "--config.train.allow_other_data=True")
        assert done.code == 0 and "was trained on other data" in caplog.text
        caplog.clear()
