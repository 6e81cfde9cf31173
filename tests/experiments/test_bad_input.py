"""Mistakes in the command line, the config and the data: each row is refused in one line that names the field and its
value, with exit code 2, before anything is written."""

import io
import json
import shlex
import zlib

import lmdb
import pytest
from PIL import Image

from data.datasets.prepared import RECORD
from tests.data.layouts import write_folder, write_lsun
from tests.scripts import only_line, refused, run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file

TRAIN = "train_inf_ae_diffusion.py"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Arguments of a command that would train, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["--config", write_config_file(tiny_config(tmp_path / "out"), tmp_path / "config.py")]


# (overrides, part of the one line)
MISTAKES = [
    # unknown fields, types
    ("data.imgsize=32", "unknown config field 'imgsize' Did you mean \"img_size\""),
    ("data.img_size.here=1", "Attempting to lookup: data.img_size.here"),
    ("nothing.here=1", "unknown config field 'nothing'"),
    ("train.batch_size=2 data.batch_size=2", "unknown config field 'batch_size'"),
    ("data.img_size=abc", "flag --config.data.img_size=abc: invalid literal for int"),
    ("optimizer.learning_rate=fast", "flag --config.optimizer.learning_rate=fast: could not convert string to float"),
    ("train.batch_size=1.5", "batch_size=1.5"),
    ("train.load_checkpoint=maybe", "--config.train.load_checkpoint=maybe: ('Non-boolean argument to boolean flag'"),
    ("model.uno_mults=abc", "uno_mults=('abc',) must be of type tuple of int"),
    ("mc_integral=3", "mc_integral=3"),
    # ranges
    ("data.img_size=8", "config.data.img_size=8 must be at least 16"),
    ("model.uno_dropout=1.0", "uno_dropout=1.0 must be below 1.0"),
    ("diffusion.gaussian_filter_std=inf", "gaussian_filter_std=inf must be a finite number"),
    ("optimizer.learning_rate=nan", "learning_rate=nan must be a finite number"),
    # words
    ("data.name=imagenet", "data.name='imagenet' is not one of photos, tissue"),
    ("mc_integral.type=grid", "type='grid' must be one of uniform, halton, stratified"),
    ("model.attention=fast", "model.attention='fast' is not one of"),
    ("model.uno_conv_type=wavelet", "uno_conv_type='wavelet' must be conv or spectral"),
    ("diffusion.noise_schedule=sigmoid", "noise_schedule='sigmoid' must be one of cosine, linear"),
    ("diffusion.model_mean_type=score", "model_mean_type='score'"),
    ("diffusion.loss_type=huber", "loss_type='huber'"),
    ("diffusion.schedule_sampler=best", "schedule_sampler='best'"),
    ("diffusion.mollifier_type=box", "mollifier_type='box'"),
    ("run.wandb_mode=sometimes", "wandb_mode='sometimes' must be one of"),
    # contradictions
    ("data.img_size=512", "data.img_size=512x512 is more than the 128x128"),
    ("mc_integral.q_sample=257", "q_sample=257 must lie between 3, model.knn_neighbours, and 256, the pixels"),
    ("model.knn_neighbours=65", "q_sample=64 must lie between 65, model.knn_neighbours"),
    ("model.kernel_size=4", "kernel_size=4 must be odd"),
    ("model.time_emb_dim=7", "time_emb_dim=7 must be even"),
    ("model.uno_res=9", "uno_res=9 must be a multiple of 2"),
    ("model.uno_mults=()", "uno_mults=() must be positive, one for each level"),
    ("model.uno_attn_resolutions=(5,)", "uno_attn_resolutions=(5,) must be among the resolutions of the levels, 8, 4"),
    ("model.uno_blocks_per_level=(1,)", "uno_blocks_per_level=(1,) must be positive, one for each of the 2 levels"),
    ("diffusion.balance_loss=True", "balance_loss=True needs diffusion.precondition=True"),
    ("diffusion.precondition=True diffusion.model_mean_type=v", "precondition"),
    ("train.accumulation_steps=3", "batch_size=4 must be a multiple of 3"),
    ("train.batch_size=10000", "train.batch_size=10000 is more than the"),
    # what this machine lacks
    ("model.backend=cudnn", "model.backend='cudnn' is not one of auto"),
    ("model.backend=torchsparse", "model.backend='torchsparse' cannot be used"),
    ("train.precision=fp16", "precision='fp16' needs a GPU; on a CPU use"),
    ("run.device=tpu", "run.device='tpu' must be auto, cpu, cuda"),
    ("run.device=cuda:17", "run.device='cuda:17' is not on this machine"),
    # folders
    ("run.experiment=../outside", "run.experiment='../outside' must be the name of a folder below"),
    ("run.output_dir=config.py", "run.output_dir='config.py': 'config.py' is not a folder; choose another"),
    ("data.name=folder data.root_dir=/nowhere/at/all", "data.root_dir='/nowhere/at/all' is not a folder; set it to"),
    ("data.name=folder data.root_dir=config.py", "data.root_dir='config.py' is not a folder; set it to"),
    # functions
    ("data.name=function", "data.function='' must be module:attribute, the name of a callable such as"),
    ("data.name=function data.function=data.random_fields:gaussian_field", "it must return real values [6, 8, 3]"),
    ("data.name=function data.function=data.random_fields:gaussian_field data.num_functions=1000000000",
     "data.num_functions=1000000000 and data.num_heldout_functions=512 are more than 100000000 together"),
    # paths never reach a shell
    ("data.name=folder 'data.root_dir=$(touch it)`touch it`;touch it'", "data.root_dir='$(touch it)`touch it`;touch"),
    ("data.name=function 'data.function=$(touch it)`touch it`;touch it'", "must be module:attribute"),
    ("'run.output_dir=config.py/$(touch it)`touch it`;touch it'", "is not a folder"),
]


@pytest.mark.parametrize("overrides, said", MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_in_the_config(base, tmp_path, overrides, said):
    words = [f"--config.{word}" for word in shlex.split(overrides)]
    assert said in refused(tmp_path, TRAIN, *base, *words)


@pytest.mark.parametrize("argument", ["--unknown_flag=1", "stray", "--config.run.seed"])
def test_a_mistake_in_the_command_line(base, tmp_path, argument):
    assert argument.lstrip("-").split("=")[0] in refused(tmp_path, TRAIN, *base, argument)


GET_CONFIG = "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
FILES = {
    "is no Python": ("hello there", "SyntaxError: invalid syntax (config.py, line 1)"),
    "needs what is not installed": ("import nothing_like_it", "No module named 'nothing_like_it' (line 1)"),
    "raises a TypeError": (GET_CONFIG + "    return 1 + 'a'\n", "could not be loaded: TypeError: unsupported operand"),
    "raises another error": (GET_CONFIG + "    return {}['a']\n", "could not be loaded: KeyError: 'a' (line 5)"),
    "ends the process": ("import sys\n\nsys.exit(3)\n", "could not be loaded: SystemExit: 3 (line 3)"),
    "defines nothing": ("x = 1\n", "could not be loaded: KeyError: 'get_config'"),
    "returns nothing": (GET_CONFIG + "    pass\n", "get_config() returns a NoneType, not a ConfigDict"),
    "returns something else": (GET_CONFIG + "    return ConfigDict({'a': 1})\n", "is not an autoencoder config"),
}


@pytest.mark.parametrize("content, said", FILES.values(), ids=FILES)
def test_a_config_file_that(tmp_path, content, said):
    (tmp_path / "config.py").write_text(content)
    assert said in refused(tmp_path, TRAIN, "--config", tmp_path / "config.py")


def test_a_config_that_is_missing_absent_a_folder_or_of_the_other_stage(tmp_path):
    assert "--config is missing" in only_line(run_script("train_latent_diffusion.py"))
    for given in (["--config", tmp_path / "nope.py"], [f"--config={tmp_path / 'nope.py'}"]):
        assert f"No such file or directory: '{tmp_path}/nope.py'" in refused(tmp_path, TRAIN, *given)
    assert "can't find '__main__' module" in refused(tmp_path, TRAIN, "--config", tmp_path)
    latent = write_config_file(tiny_latent_config(tmp_path), tmp_path / "latent.py")
    assert "is not an autoencoder config" in refused(tmp_path, TRAIN, "--config", latent)
    first = write_config_file(tiny_config(tmp_path), tmp_path / "config.py")
    assert "is an autoencoder config" in refused(tmp_path, "train_latent_diffusion.py", "--config", first,
                                                 "--decoder_config", first)


@pytest.mark.parametrize("section, field, value, said", [
    ("model", "channel_mult", 3, "config.model.channel_mult=3 is not a known field"),
    ("model", "nf", None, "config.model.nf=None must be of type int"),
    ("train", "batch_size", "many", "config.train.batch_size='many' must be of type int"),
    ("model", "uno_mults", ("1", 2), "config.model.uno_mults=('1', 2) must be of type tuple of int"),
    ("model", "nf", {}, "--config lacks model.nf"),
    ("data", None, 3, "config.data=3 must be of type ConfigDict"),
    ("run", "experiment", "", "config.run.experiment='' must be the name of a folder"),
])
def test_a_field_of_a_config_file(tmp_path, section, field, value, said):
    config = tiny_config(tmp_path).to_dict()
    if field is None:
        config[section] = value
    else:
        config[section][field] = value
    path = tmp_path / "config.py"
    path.write_text(GET_CONFIG + f"    return ConfigDict({config!r})\n")
    assert said in refused(tmp_path, TRAIN, "--config", path)


def test_a_field_that_a_config_file_lacks(tmp_path):
    config = tiny_config(tmp_path)
    del config.model["nf"]
    path = write_config_file(config, tmp_path / "config.py")
    assert "lacks model.nf" in refused(tmp_path, TRAIN, "--config", path)


def test_wandb_online_without_a_login_does_not_wait(base, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    result = run_script(TRAIN, *base, "--config.run.wandb_mode=online")
    assert "wandb login" in result.err.splitlines()[-1] and result.code == 2


def bomb():
    """A PNG of a few hundred kilobytes with 400 million pixels."""
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = 20_000
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def float_pixels():
    buffer = io.BytesIO()
    Image.new("F", (20, 20)).save(buffer, "TIFF")
    return buffer.getvalue()


def overwritten(make):
    """Layout: a folder of 21 images, 20 to train on, of which two have the content make(content)."""
    def layout(root):
        for name in write_folder(root, 21)[:2]:
            (root / name).write_bytes(make((root / name).read_bytes()))
    return layout


def lmdb_with(key, value):
    def layout(root):
        root.mkdir()
        with lmdb.open(str(root)) as environment, environment.begin(write=True) as transaction:
            transaction.put(key, value)
    return layout


def prepared_from(**changes):
    record = {"format": 1, "name": "folder", "size": [16, 16], "channels": 3, "complete": True,
              "parts": {part: {"total": 3, "source": "", "seen": 3, "stored": 3} for part in ("train", "held_out")}}
    return lmdb_with(RECORD, json.dumps(record | changes).encode())


def split_without_files(root):
    write_folder(root, 5)
    (root / "split.json").write_text('{"train": ["a.png"], "val": ["b.png"]}')


# (data.name, content of data.root_dir, part of the one line)
DATA = {
    "nothing": ("folder", lambda root: root.mkdir(), "has no images; expected files like 00000.png"),
    "one image": ("folder", lambda root: write_folder(root, 1), "has one image; at least 2 are needed"),
    "other files": ("ffhq", lambda root: write_folder(root, 3, "{}.jpg"), "has no images; expected files like"),
    "no lsun": ("churches", lambda root: write_folder(root, 3), "has no church_outdoor_train_lmdb/data.mdb; set it to"),
    "lsun of training alone": ("churches", lambda root: write_lsun(root, "train", 9), "church_outdoor_val_lmdb"),
    "lmdb of something else": ("folder", lmdb_with(b"a", b"b"), "LMDB that data/prepare.py did not write or finish"),
    "lmdb of another data set": ("folder", prepared_from(name="ffhq"), "was prepared from 'ffhq'; change one of them"),
    "lmdb of another version": ("folder", prepared_from(format=9), "has format 9, this version reads 1; prepare"),
    "lmdb of smaller images": ("folder", prepared_from(size=[8, 8]), "data.img_size=16x16 is more than the 8x8"),
    "lmdb of grey images": ("folder", prepared_from(channels=1), "data.channels=3, but data.root_dir="),
    "lmdb half done": ("folder", prepared_from(complete=False), "is unfinished, run prepare again"),
    "lmdb with a broken record": ("folder", lmdb_with(RECORD, b"{"), "has a damaged record; prepare the data again"),
    "split of other files": ("celeba", split_without_files, "split.json lists 'a.png', which is not in"),
    "too few for a batch": ("folder", lambda root: write_folder(root, 4), "train.batch_size=4 is more than the 3"),
}
FOUND_WHEN_READ = {
    "empty images": overwritten(lambda content: b""),
    "text named .png": overwritten(lambda content: b"<html>404</html>"),
    "truncated images": overwritten(lambda content: content[:60]),
    "decompression bombs": overwritten(lambda content: bomb()),
    "images of floats": overwritten(lambda content: float_pixels()),
}


@pytest.mark.parametrize("name, layout, said", DATA.values(), ids=DATA)
def test_data_that_are(base, tmp_path, name, layout, said):
    layout(tmp_path / "data")
    overrides = [f"--config.data.name={name}", f"--config.data.root_dir={tmp_path / 'data'}"]
    assert said in refused(tmp_path, TRAIN, *base, *overrides)


@pytest.mark.filterwarnings("ignore:folder")
@pytest.mark.parametrize("layout", FOUND_WHEN_READ.values(), ids=FOUND_WHEN_READ)
def test_more_than_one_percent_of(base, tmp_path, layout):
    """One bad file is passed over with a warning, more stop the run: which has begun by then, and lost nothing."""
    layout(tmp_path / "data")
    overrides = ["--config.data.name=folder", f"--config.data.root_dir={tmp_path / 'data'}"]
    begun = ("out", "tiny", ".lock", "images", "config.json", "metrics.jsonl")
    line = refused(tmp_path, TRAIN, *base, *overrides, may_write=begun)
    assert "2 of 20 training images cannot be read" in line and "repair or remove such files" in line
