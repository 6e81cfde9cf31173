"""Scripts with worker processes end within seconds, however they fail, and leave no process behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.data.layouts import write_folder
from tests.scripts import ROOT, run_script
from tests.tiny import tiny_config, tiny_latent_config, write_config_file

SCRIPT = "tests/utils/failing_script.py"
ENDS = {  # failure -> (exit code, last line of stderr or a part of it)
    "raises": (1, "KeyError: 'no such thing'"),
    "full disk": (1, "error: [Errno 28] No space left on device"),
    "mistake": (2, "error: data.root_dir='x' is wrong"),
    "is killed": (-signal.SIGKILL, ""),
    "worker raises": (1, "RuntimeError: no such thing"),
    "no shared memory": (1, "error: a worker that reads data is lost"),
    "worker is killed": (1, "error: a worker that reads data is lost"),
    "job is stopped": (75, "stopped"),
}


def end_of(*command):
    """(exit code, stderr) of a process in a session of its own. AssertionError if it, or any process that it started,
    does not end."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True, start_new_session=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        error = process.communicate(timeout=100)[1]
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    except ProcessLookupError:
        return process.returncode, error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("a worker is left")


def test_an_exception_in_a_worker_ends_the_script():
    code, error = end_of(SCRIPT, "fork", "worker raises")
    assert code == 1 and "RuntimeError: no such thing" in error


@pytest.mark.slow
@pytest.mark.parametrize("failure", ENDS)
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_every_failure_ends_the_script(method, failure):
    code, line = ENDS[failure]
    found, error = end_of(SCRIPT, method, failure)
    assert found == code and line in error


PATCHED = """
import runpy, sys
from {module} import {owner}
def fail(*_, **__):
    raise RuntimeError("a bug")
{owner}.{name} = fail
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("module, owner, name, stage", [
    ("diffusion.gaussian_diffusion", "GaussianDiffusion", "training_losses", 1),
    ("utils.trainer", "Trainer", "_validate", 1),
    ("models.autoencoder", "SparseEncoder", "forward", 2),
    ("models.autoencoder", "SparseUNet", "forward", 3),
])
def test_a_bug_in_any_phase_ends_the_script(tmp_path, module, owner, name, stage):
    """In the loss and in validation of stage 1, in the encoder of stage 2, and in the decoder of a sampling script."""
    write_folder(tmp_path / "data", 23)
    config = tiny_config(tmp_path, tmp_path / "data", "folder")
    config.data.num_workers, config.train.validate_steps, config.train.max_steps = 2, 1, 1
    first = ["--config", write_config_file(config, tmp_path / "ae.py")]
    latent = write_config_file(tiny_latent_config(tmp_path), tmp_path / "latent.py")
    command = {1: ["train_inf_ae_diffusion.py", *first],
               2: ["train_latent_diffusion.py", "--config", latent, "--decoder_config", first[1]],
               3: ["experiments/generate_recons.py", *first, "--sampling_steps=2", "--output", tmp_path / "out"]}[stage]
    if stage > 1:
        assert run_script("train_inf_ae_diffusion.py", *first, "--config.data.num_workers=0").code == 0
    code, error = end_of("-c", PATCHED.format(module=module, owner=owner, name=name), *command)
    assert code == 1 and "RuntimeError: a bug" in error
