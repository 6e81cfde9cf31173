"""Find the commands of Markdown pages, and shrink them so that a test can run them."""

import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from torch.distributed.run import get_args_parser

from tests.data.layouts import write_folder
from tests.scripts import ROOT, run_script
from utils import cli

STAGE_1, STAGE_2 = "train_inf_ae_diffusion.py", "train_latent_diffusion.py"
DEVICE = {"run.device": "cpu", "train.precision": "fp32", "train.sample_size": 2, "train.max_steps": 1,
          "train.compile": False}
SMALL_AUTOENCODER = {
    **DEVICE, "data.name": "folder", "data.img_size": 16, "data.num_workers": 0, "data.num_functions": 32,
    "data.num_heldout_functions": 16, "train.batch_size": 8, "model.nf": 8, "model.time_emb_dim": 8,
    "model.num_conv_blocks": 1, "model.kernel_size": 3, "model.uno_res": 16, "model.uno_base_channels": 8,
    "model.z_dim": 6, "diffusion.steps": 4, "mc_integral.q_sample": 64}
SMALL_LATENT = {
    **DEVICE, "data.fid_samples": 4, "train.batch_size": 8, "model.z_dim": 6, "model.num_layers": 2,
    "model.hid_channels": 8, "diffusion.steps": 4}
SAMPLES = {"num_samples": 4, "sampling_steps": 2}
FEATURES = {"feature_model": "efficientnet_lite0", "split": "heldout"}
SMALL = {  # script -> flags that make it quick
    STAGE_1: {}, STAGE_2: {}, "data/prepare.py": {"size": 16, "workers": 1},
    "experiments/generate_samples.py": {**SAMPLES, "latent_sampling_steps": 2},
    "experiments/generate_recons.py": SAMPLES,
    "experiments/generate_noise.py": {},
    "experiments/calculate_fid.py": FEATURES,
    "experiments/compare_resolutions.py": {},
    "experiments/export_weights.py": {},
    "experiments/inpaint.py": SAMPLES,
    "experiments/inverse_problem.py": {"num_samples": 1, "num_posterior_samples": 2, "sampling_steps": 2},
    "experiments/super_resolution.py": {**SAMPLES, "num_samples": 2},
    "experiments/interpolate.py": {"num_pairs": 1, "frames": 2, "directions": 1, "encodings": 8, "sampling_steps": 2},
    "experiments/report.py": {"pictures": ""},  # which need samples
    "experiments/spectrum.py": {},
}
SIZES = {"sample_img_size": 32, "input_img_size": 16}  # replace those of a command
READ = ("samples", "reference", "real", "input", "folder")  # flags whose folders are filled with images
PARSED = ("experiments/benchmark.py", "experiments/ablate.py", "experiments/flow_error.py")  # tested elsewhere


class Block(NamedTuple):
    """A code block: its place (file:line), its language or "", and its text."""

    place: str
    language: str
    text: str


def blocks(path):
    """Code blocks of a Markdown file."""
    text = path.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, match.start()) + 2
        yield Block(f"{path.relative_to(ROOT)}:{line}", match[1], match[2])


def commands(path):
    """(place, command) for every line of code blocks without a language, and for whole commands within the text."""
    for block in blocks(path):
        if block.language == "":
            for line in block.text.replace("\\\n", " ").splitlines():
                yield block.place, line
    text = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), path.read_text(), flags=re.M | re.S)
    for match in re.finditer(r"`(python \S+\.py --[^`…]+)`", text):
        yield f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}", match[1]


def words_of(command):
    """The words of a command of one of the project's scripts, without torchrun and its flags. AssertionError for any
    other command."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        parsed = get_args_parser().parse_args(words)
        words = [parsed.training_script, *parsed.training_script_args]
    else:
        assert program in ("python", ".venv/bin/python"), command
    assert (ROOT / words[0]).is_file(), command
    return words


def make_commands(target):
    """Commands of the project's scripts that `make <target>` would run."""
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = dry.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"\.venv/bin/python \S+\.py ", line)]


def flag(words, name):
    """Value of the last --name, or None."""
    value = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == f"--{name}":
            value = following
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


class Shrunk:
    """Runs commands in an empty folder. Small models are trained there when a command needs them."""

    def __init__(self, folder):
        self.folder = folder
        self.runs = {}
        write_folder(folder / "images", 160, width=64, height=64)  # of which 8 are held out

    def run(self, command):
        """Result of a command. The working directory must be this folder."""
        script, *words = words_of(command)
        words = [self.config_path(word) for word in words]
        if script in PARSED:
            return parse(script, words)
        assert script in SMALL, f"{script}: say in tests/commands.py how to make it quick"
        self.train_what_is_needed(script, words)
        if script in (STAGE_1, STAGE_2):
            return self.train(script, words)
        for name in READ:
            self.make_images(flag(words, name))
        sampled = script.endswith("calculate_fid.py") and flag(words, "samples") is None
        more = {**SMALL[script], **(SMALL["experiments/generate_samples.py"] if sampled else {}),
                **{name: size for name, size in SIZES.items() if flag(words, name)}}
        output = flag(words, "output")
        if output is not None:
            more["output"] = self.folder / "output" / str(len(list(self.folder.glob("output/*")))) / Path(output).name
            more["output"].parent.mkdir(parents=True)
        return run_script(script, *words, *self.small(words), *(f"--{name}={more[name]}" for name in more))

    def config_path(self, word):
        """The word with an absolute path of a config, of this folder or else of the project."""
        def absolute(match):
            return str(next(root for root in (self.folder, ROOT) if (root / match[0]).is_file()) / match[0])

        return re.sub(r"(?:(?<=^)|(?<==))configs/\w+\.py$", absolute, word)

    def small(self, words):
        """Flags that shrink the configs among the words."""
        for name in ("config", "decoder_config", "latent_config"):
            path = flag(words, name)
            if path is not None and "latent" in Path(path).name:
                yield from (f"--{name}.{field}={value}" for field, value in SMALL_LATENT.items())
            elif path is not None:
                fields = {**SMALL_AUTOENCODER, "data.root_dir": self.folder / "images"}
                config = runpy.run_path(path)["get_config"]()
                if config.data.name == "function":
                    fields["data.name"] = "function"
                for field in ("data.name", "model.z_dim"):  # on which the data or the kind of the model depend
                    fields[field] = flag(words, f"{name}.{field}") or fields[field]
                if not config.model.z_dim:
                    del fields["model.z_dim"]
                yield from (f"--{name}.{field}={value}" for field, value in fields.items())

    def train_what_is_needed(self, script, words):
        """Train the models that a command needs, by its configs."""
        if script in (STAGE_1, "data/prepare.py"):
            return
        given = {name: [f"--{name}={flag(words, name)}"] + [word for word in words if word.startswith(f"--{name}.")]
                 for name in ("config", "decoder_config", "latent_config") if flag(words, name)}
        latent = [(name, of) for name, of in given.items() if "latent" in Path(flag(words, name)).name]
        first = [[word.replace(f"--{name}", "--config", 1) for word in of]
                 for name, of in given.items() if (name, of) not in latent]
        for one in first:
            self.train(STAGE_1, one, again=False)
        if latent and first and script != STAGE_2:
            (name, of), = latent
            second = [word.replace(f"--{name}", "--config", 1) for word in of]
            self.train(STAGE_2, second + [word.replace("--config", "--decoder_config", 1) for word in first[0]],
                       again=False)

    def train(self, script, words, again=True):
        """Result of a training command. A repeated command runs in another folder, or not at all."""
        key = (script, *words)
        if key in self.runs and not again:
            return self.runs[key]
        where = ["--config.run.output_dir=checkpoints"]
        if key in self.runs:
            where = ["--config.run.output_dir=again"]
            shutil.rmtree(self.folder / "again", ignore_errors=True)
        if flag(words, "decoder_config"):
            where.append("--decoder_config.run.output_dir=checkpoints")
        result = run_script(script, *words, *self.small(words), *where)
        assert result.code == 0, result.err
        self.runs[key] = result
        return result

    def make_images(self, folders):
        """Fill each missing folder with images, larger ones in folders of larger samples."""
        for name in folders.split(",") if folders else ():
            if not (self.folder / name).exists():
                side = 32 if re.search("[24]x", name) else 16
                write_folder(self.folder / name, 8, width=side, height=side)


def parse(script, words):
    """Result of a script of which only the flags and config files are read."""
    def only_parse(main, shared=False, several=()):
        run(lambda: None, shared, several)

    run, cli.run = cli.run, only_parse
    try:
        return run_script(script, *words)
    finally:
        cli.run = run
