"""Command lines, environments and streams that a script has to cope with, and the lines it prints about errors."""

import io
import subprocess
import sys

import pytest
import torch

from tests.scripts import ROOT, only_line, run_script
from tests.tiny import tiny_config, write_config_file
from utils import cli
from utils.config import check_autoencoder_config, run_dir
from utils.errors import UserError
from utils.logging import read_metrics

TRAIN = "train_inf_ae_diffusion.py"


@pytest.fixture
def base(tmp_path):
    return [TRAIN, "--config", write_config_file(tiny_config(tmp_path / "out"), tmp_path / "config.py")]


@pytest.mark.parametrize("words", [["--config.model.uno_mults=(1,2)", "--config.model.uno_mults=abc"],
                                   ["--config.model.uno_mults", "(1,2)", "--config.model.uno_mults", "abc"]])
def test_of_repeated_flags_the_last_counts_also_for_tuples(base, words):
    assert "uno_mults=('abc',) must be of type tuple" in only_line(run_script(*base, *words))


@pytest.mark.parametrize("variables, said", [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment must be a whole number"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment must"),
    ({"WORLD_SIZE": "2"}, "RANK='' in the environment must"),
    ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1' in the environment must"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK='x' in the environment must"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": ""}, "MASTER_PORT='' in the environment must"),
])
def test_variables_of_torchrun_that_are_left_over_are_named(base, monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert said in only_line(run_script(*base))


@pytest.mark.parametrize("world_size", ["", " ", "1"])
def test_without_a_world_size_there_is_one_process(base, monkeypatch, world_size):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("RANK", "nonsense")
    assert "batch_size=0" in only_line(run_script(*base, "--config.train.batch_size=0"))


@pytest.mark.parametrize("name", ["None", "a" * 300, "a/" + "b" * 300, ""])
def test_names_that_make_no_folder_are_refused(name):
    config = tiny_config("out")
    config.run.experiment = name
    with pytest.raises(UserError, match="must be the name of a folder below run.output_dir, of at most 255 bytes"):
        check_autoencoder_config(config, "config")


def test_home_is_expanded_in_paths_of_a_config_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tiny_config("~/out", "~/data")
    check_autoencoder_config(config, "config")
    assert run_dir(config) == tmp_path / "out" / "tiny" and config.data.root_dir == f"{tmp_path}/data"


class Gone(io.StringIO):
    def write(self, text=""):
        raise BrokenPipeError(32, "Broken pipe")

    flush = write


@pytest.mark.parametrize("stream", [Gone(), io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO()])
def test_printing_never_fails(stream):
    output = cli._Output(stream, 1)
    print("PSNR · 24 dB", file=output, flush=True)
    if isinstance(stream, io.TextIOWrapper):
        assert stream.buffer.getvalue() == b"PSNR ? 24 dB\n"
    io.StringIO.close(stream) if isinstance(stream, Gone) else stream.close()
    print("again", file=output, flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["2>&-", ">&- 2>&-", "2>&1 | head -c 1"])
def test_closed_streams_do_not_stop_training(base, tmp_path, redirect):
    command = " ".join([sys.executable, *base, "--config.train.max_steps=2", "--config.train.plot_samples_steps=0"])
    subprocess.run(["bash", "-c", f"{command} {redirect}"], cwd=ROOT, check=True, timeout=100, capture_output=True)
    assert (tmp_path / "out" / "tiny" / "checkpoint.pt").exists()
    assert read_metrics(tmp_path / "out" / "tiny" / "metrics.jsonl")  # into which nothing else was printed


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("main, said", [
    (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")),
     "error: out of GPU memory (CUDA out of memory); to train, raise train.accumulation_steps"),
    (lambda: torch.empty(2**50), "error: out of memory; to train, raise train.accumulation_steps"),
    (raising(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")),
     "error: a worker that reads data is lost, perhaps because memory, shared memory (/dev/shm)"),
    (raising(RuntimeError("received 0 items of ancdata")), "error: a worker that reads data is lost"),
])
def test_resources_that_run_out_are_one_line(monkeypatch, main, said):
    error = io.StringIO()
    for name, value in (("argv", ["script.py"]), ("stdout", io.StringIO()), ("stderr", error)):
        monkeypatch.setattr(sys, name, value)
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 1 and error.getvalue().startswith(said) and error.getvalue().count("\n") == 1


def test_a_bug_in_a_worker_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(raising(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\na bug")))
