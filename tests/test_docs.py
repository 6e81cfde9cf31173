"""README.md, BENCHMARKS.md and docs/: links lead somewhere, examples work, commands run, and code cites what exists."""

import ast
import importlib
import os
import re
import stat
import subprocess
import sys
import types
import zipfile

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import models.build
import models.sparse_conv
from configs.ablations import AXES, get_variants
from data.coordinates import Coordinates
from data.datasets import DATASETS, build_dataset
from diffusion import samplers
from models.build import build_decoder, build_encoder, build_latent_model
from models.kernels import BACKENDS, Backend
from models.sparse_conv import sparse_conv
from tests.commands import STAGE_1, Shrunk, blocks, commands, make_commands, words_of
from tests.data.layouts import config, write_folder
from tests.diffusion.test_samplers import VARIANCE, normal_denoiser, schedule_of
from tests.models.operator import check_against_loops, draw
from tests.models.tiny import awake, tiny_config
from tests.models.tiny import draw as draw_points
from tests.scripts import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "BENCHMARKS.md", *sorted(DOCS.glob("*.md"))]
PACKAGES = ("configs", "data", "diffusion", "experiments", "models", "utils")
CODE = [*ROOT.glob("*.py"), *(path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py"))]
OTHER = ("make demo", "make test")
COMMANDS = {command: place for page in PAGES for place, command in commands(page) if command not in OTHER}
LANGUAGES = {"", "bash", "python", "bibtex", "text"}  # the last for equations
LINK = re.compile(r"\[([^]]*)\]\(([^)\s]+)\)")
MOST_LINES = {"README.md": 180, "BENCHMARKS.md": 120}


def python_blocks():
    """{path in its first line: text} of the examples of docs/extending.md."""
    found = [block.text for block in blocks(DOCS / "extending.md") if block.language == "python"]
    return {re.match("# (.*)", text)[1]: text for text in found}


EXAMPLES = python_blocks()
KNOWN = (*EXAMPLES, "experiments/name.py")  # files that texts may name without their being there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_headings_and_names(page):
    for text, target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        path = (page.parent / path).resolve() if path else page
        assert path.exists(), target
        if anchor:
            assert anchor in headings(path), target
        if path.suffix == ".py" and text.startswith("`") and not text.endswith(".py`"):
            assert text.strip("`") in names(path), f"{page.name}: {path.name} has no {text}"


def headings(path):
    """Anchors of a Markdown file, as GitHub makes them."""
    lines = re.sub("^```.*?^```$", "", path.read_text(), flags=re.M | re.S).splitlines()
    return {re.sub(r"[^\w\- ]|²", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines if line[:1] == "#"}


def names(path):
    """Functions, classes, their methods (Class.method) and constants of a Python file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in ast.walk(node) if isinstance(target, ast.Name)}
    return found


def test_the_code_cites_sections_of_the_method_that_exist():
    sections = set(re.findall(r"^##+ (\d+(?:\.\d+)?) ", (DOCS / "method.md").read_text(), re.M))
    cited = [(path, number) for path in CODE
             for number in re.findall(r"docs/method\.md,[\s#]+(\d+(?:\.\d+)?)", path.read_text())]
    assert len(cited) > 20
    assert not [(path, number) for path, number in cited if number not in sections]


def test_nothing_cites_a_page_that_is_not_here():
    wrong = [path for path in CODE if re.search(r"\bMETHOD\b", path.read_text()) and path.name != "test_docs.py"]
    assert not wrong


def test_texts_name_files_that_exist():
    """Paths in pages, code and the Makefile, and modules in docstrings and comments."""
    files = [path for path in CODE if ROOT / "tests" not in path.parents]
    wrong = []
    for file in [*PAGES, ROOT / "Makefile", ROOT / "pyproject.toml", *files]:
        text = file.read_text()
        paths = re.findall(rf"(?<![\w/.])(?:(?:{'|'.join(PACKAGES)}|tests|docs)/[\w/]+\.(?:py|md)|[A-Z]+\.md)\b", text)
        modules = re.findall(r"(?<![\w/.\-])((?:models|utils|experiments)(?:\.[a-z]\w*)+)", text)
        wrong += [(file.name, path) for path in paths if not (ROOT / path).is_file() and path not in KNOWN]
        wrong += [(file.name, name) for name in modules if not is_module(name)]
    assert not wrong


def is_module(name):
    """Whether a dotted name is a module or package, or a name in one."""
    path = ROOT / name.replace(".", "/")
    return any(path.with_suffix(".py").is_file() or path.is_dir() for path in (path, path.parent))


def test_pages_are_reached_from_the_readme_and_of_a_readable_length():
    linked = {target.partition("#")[0] for _, target in LINK.findall((ROOT / "README.md").read_text())}
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:]} <= linked
    for name, most in MOST_LINES.items():
        assert len((ROOT / name).read_text().splitlines()) <= most


def test_every_block_is_of_a_kind_that_is_tested():
    assert {block.language for page in PAGES for block in blocks(page)} <= LANGUAGES
    assert len(COMMANDS) > 25
    for language, found in (("bash", {"running.md"}), ("python", {"functions.md", "extending.md"})):
        assert {page.name for page in PAGES for block in blocks(page) if block.language == language} == found
    for command in COMMANDS:
        words_of(command)


def test_the_conda_file_only_wraps_the_requirements():
    text = (ROOT / "requirements.yml").read_text()
    active = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert active == ["name: infty-diff", "channels:", "- conda-forge", "dependencies:", "- python=3.11", "- pip",
                      "- pip:", "- -r requirements.txt"]
    assert "flash-attn" in text and "torchsparse" in text  # optional, named in comments


# ---- Examples


def example(path, module=None):
    """Run the example of that path, in a new module or within a given one."""
    module = module or types.ModuleType(path.removesuffix(".py").replace("/", "."))
    exec(compile(EXAMPLES[path], path, "exec"), module.__dict__)
    return module


def test_the_function_of_the_example(monkeypatch):
    text, = (block.text for block in blocks(DOCS / "functions.md") if block.language == "python")
    module = types.ModuleType("my_waves")
    exec(compile(text, "my_waves.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_waves", module)
    settings = config("function", channels=1)
    settings.data.function = "my_waves:wave"
    items = [build_dataset(settings, train)[0] for train in (True, False)]
    assert items[0].shape == items[1].shape == (1, 16, 16) and not torch.equal(*items)


def test_the_block_of_the_example(monkeypatch):
    """Its gate takes part, on all points at once as on parts of a large image."""
    monkeypatch.setattr(models.build, "SparseBlock", example("models/gated_block.py").GatedBlock)
    decoder = awake(build_decoder(tiny_config(backend="torch_dense")))
    _, t, z, _ = draw_points(size=(48, 48))
    coords = Coordinates.full(2, (48, 48))
    values = torch.randn(2, 48 * 48, 3)
    whole, parts = decoder(values, t, z, coords), decoder(values, t, z, coords, max_points=1000)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        decoder.blocks[0].gate.bias.fill_(-100)
    assert (decoder(values, t, z, coords) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 3, 4, 6)], ids=["depthwise", "full"])
@pytest.mark.parametrize("density", [1 / 4, 1])
def test_the_kernel_of_the_example(monkeypatch, shape, density):
    module = example("models/kernels/torch_taps.py")
    monkeypatch.setitem(BACKENDS, "torch_taps", Backend(("cpu",), module.unavailable_reason, module.neighbour_sum))
    monkeypatch.setattr(models.sparse_conv, "NAMES", (*models.sparse_conv.NAMES, "torch_taps"))
    problem = draw((9, 14), density, shape, "shuffled")
    check_against_loops(lambda *given: sparse_conv(*given, backend="torch_taps"), *problem, tolerance=1e-4)


def test_the_data_set_of_the_example(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "zip", example("data/datasets/zipped.py").Zipped)
    paths = write_folder(tmp_path / "folder", 41)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in paths:
            archive.write(tmp_path / "folder" / path, path)
    for train in (True, False):
        ours = build_dataset(config("zip", tmp_path / "images.zip"), train)
        plain = build_dataset(config("folder", tmp_path / "folder"), train)
        assert len(ours) == len(plain) and all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        assert len(ours.fingerprint()) == 32


def test_the_sampler_of_the_example_is_of_second_order():
    module = types.ModuleType("samplers")
    module.__dict__.update(vars(samplers))
    heun = example("diffusion/samplers.py", module).ddim_heun

    def error(steps):
        """Of the state of step 0, from which the last step, to alpha_bar = 1, is of first order."""
        schedule, x = schedule_of(steps, "linear"), torch.ones(1, 1, dtype=torch.float64)
        *_, (_, state), _ = heun(normal_denoiser(schedule), x, schedule)
        variances = [(a * VARIANCE + 1 - a) for a in schedule.alpha_bar[[0, -1]]]
        return (state - (variances[0] / variances[1]).sqrt() * x).abs().item()

    assert error(100) / error(200) == pytest.approx(4, rel=0.2)


def test_the_config_of_the_example():
    found = example("configs/flowers_128_config.py").get_config()
    assert (found.data.name, found.mc_integral.q_sample) == ("folder", 64 * 64)


# ---- The tables of docs/paper.md and docs/ablations.md


def table_rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]


def load(name):
    return importlib.import_module(f"configs.{name}_config")


def test_published_figures_are_those_of_the_configs():
    text = (DOCS / "paper.md").read_text()
    rows = re.findall(r"^\| \S+ \| `(\w+)`, `(\w+)` \| ([\d.]+) ", text, re.M)
    assert len(rows) == 4
    for first, second, figure in rows:
        assert figure in load(first).__doc__
        assert load(first).get_config().model.z_dim == load(second).get_config().model.z_dim
    rates = re.findall(r"^\| (\d)× \| (\d+)[^|]*\| ([\d.]+) ", text, re.M)
    assert [int(rate) * int(pixels) for rate, pixels, _ in rates] == [128 * 128] * 4
    assert all(figure in AXES["subsampling"].__doc__ for _, _, figure in rates)


def test_the_axes_are_all_there():
    base, rows = load("ffhq_128").get_config(), dict(table_rows((DOCS / "ablations.md").read_text()))
    assert sorted(name.strip("`") for name in rows) == sorted(AXES)
    for name, words in rows.items():
        if name != "`seed`":
            assert len(get_variants(name.strip("`"), base)) == words.count(",") + 1


def test_the_counted_costs():
    """Parameters of all models and, of the smallest, the operations; the larger ones take seconds and much memory."""
    text = (DOCS / "paper.md").read_text().partition("\n## Cost")[2]
    rows = {name.strip("`"): cells for name, *cells in table_rows(text)}
    latent = {"celeba_64": "celeba_64_latent", "ffhq_128": "ffhq_128_latent", "ffhq_256": "ffhq_latent",
              "churches_256": "churches_latent"}
    assert rows.keys() == latent.keys()
    for name, cells in rows.items():
        cfg = load(name).get_config()
        with torch.device("meta"):
            networks = build_decoder(cfg), build_encoder(cfg), build_latent_model(load(latent[name]).get_config())
        millions = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks]
        assert cells[0] == ", ".join(f"{number:.1f}" for number in millions)
        decoder, encoder, everywhere = map(float, f"{cells[1]}, {cells[2]}".split(", "))
        assert float(cells[3]) == pytest.approx(3e-3 * cfg.train.batch_size * (decoder + encoder), rel=0.02)
        assert float(cells[4]) == pytest.approx(50_000 * 100 * everywhere / 1e6, rel=0.02)

    cfg = load("celeba_64").get_config()
    decoder, encoder, t, z = build_decoder(cfg).eval(), build_encoder(cfg).eval(), torch.zeros(1), torch.zeros(1, 256)
    part, full = Coordinates.random(1, (64, 64), cfg.mc_integral.q_sample), Coordinates.full(1, (64, 64))
    values = torch.zeros(1, 64 * 64, 3)
    counted = (gflop(decoder, values[:, :part.num_points], t, z, part),
               gflop(encoder, values[:, :part.num_points], part), gflop(decoder, values, t, z, full))
    assert [f"{number:.2f}" for number in counted] == f"{rows['celeba_64'][1]}, {rows['celeba_64'][2]}".split(", ")


def gflop(network, *inputs):
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops() / 1e9


# ---- The Slurm script of docs/running.md, and all commands


@pytest.fixture
def slurm(tmp_path):
    """(exit code of the training) -> (exit code of the Slurm script, calls of scontrol, of python) with two tasks."""
    script, = (block.text for block in blocks(DOCS / "running.md") if block.language == "bash")
    stubs = {
        "scontrol": 'echo "$@" >> scontrol.log; if [ "$1" = show ]; then printf "node1\\nnode2\\n"; fi',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n'
                'for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@"; code=$?; done; exit $code',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT python $*" >> python.log; exit $CODE',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "job.sh").write_text(script)

    def run(code):
        done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env={
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code), "SLURM_NTASKS": "2",
            "SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "node[1-2]"}, capture_output=True, text=True)
        assert not done.stderr
        calls = ((tmp_path / f"{name}.log").read_text().splitlines() for name in ("scontrol", "python"))
        return done.returncode, *calls

    return run


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130])
def test_the_slurm_script_requeues_a_run_that_was_stopped_and_no_other(slurm, code):
    ended, scontrol, tasks = slurm(code)
    assert ended == code
    assert scontrol == ["show hostnames node[1-2]", *(["requeue 1234"] if code == 75 else [])]
    places, training = zip(*(task.split(" python ") for task in tasks), strict=True)
    assert places == ("0 0 2 node1 21234", "1 1 2 node1 21234")
    assert training[0] == training[1] and words_of(f"python {training[0]}")[0] == STAGE_1


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    for path, text in EXAMPLES.items():
        if path.startswith("configs/"):
            (folder / "configs").mkdir(exist_ok=True)
            (folder / path).write_text(text)
    return Shrunk(folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=COMMANDS.get)
def test_command(shrunk, monkeypatch, command):
    monkeypatch.chdir(shrunk.folder)
    result = shrunk.run(command)
    assert result.code == 0, result.err


@pytest.mark.slow
def test_the_commands_of_make_demo(shrunk, monkeypatch):
    monkeypatch.chdir(shrunk.folder)
    found = make_commands("demo")
    assert len(found) == 12
    for command in found:
        result = shrunk.run(command)
        assert result.code == 0, (command, result.err)
