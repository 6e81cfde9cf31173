"""The GPU path on a GPU that computes nothing (nullgpu/nullgpu.c): devices, waits, launches and memory are real."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.scripts import ROOT
from tests.tiny import tiny_config, tiny_latent_config, write_config_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    torch.cuda.is_available() or not sys.platform.startswith("linux") or not torch.version.cuda
    or shutil.which("gcc") is None or importlib.util.find_spec("triton") is None,
    reason="emulates a GPU with gcc, Triton and a CUDA build of PyTorch")]
SOURCE = Path(__file__).parent / "nullgpu/nullgpu.c"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment variables of a process that sees an A100."""
    folder = tmp_path_factory.mktemp("nullgpu")
    library = folder / "libcuda.so.1"
    include = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/include"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-w", "-std=gnu11", f"-I{include}", SOURCE, "-o", library,
                    "-Wl,-soname,libcuda.so.1", "-ldl", "-lpthread"], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": str(library),
            "TRITON_CACHE_DIR": str(folder / "triton"), "OMP_NUM_THREADS": "1"}


def run(environment, *command):
    """stdout of `python <command>`, which must end with exit code 0."""
    ran = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def last_step(out):
    """The line of nullgpu/steps.py: launches, waits, memory in GiB."""
    return json.loads([line for line in out.splitlines() if line.startswith("[")][-1])


def test_a_step_of_the_published_model_never_waits(environment, tmp_path):
    """Batch 4 of ffhq_256, as a rank of eight has it: launches and peak memory within what was measured."""
    out = run(environment, "tests/nullgpu/steps.py", "train_inf_ae_diffusion.py", "--config",
              "configs/ffhq_256_config.py", f"--config.run.output_dir={tmp_path}", "--config.data.name=function",
              "--config.data.function=data.random_fields:gaussian_field", "--config.data.channels=1",
              "--config.data.num_functions=16", "--config.data.num_heldout_functions=2",
              "--config.train.batch_size=4", "--config.train.max_steps=4", "--config.train.compile=False",
              "--config.data.num_workers=0", "--config.train.nonfinite=skip",
              "--config.train.validate_steps=100", "--config.train.plot_graph_steps=100",
              "--config.train.checkpoint_steps=100", "--config.train.plot_samples_steps=0")
    launches, waits, memory = last_step(out)
    assert launches <= 2800 and waits == 0 and memory <= 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_tensors_meet_on_one_device(environment, tmp_path, ranks):
    """Both stages without a wait, samples at two sizes, reconstructions."""
    first, second = tiny_config(tmp_path, name="function"), tiny_latent_config(tmp_path)
    first.data.function, first.data.channels = "data.random_fields:gaussian_field", 1
    first.data.num_functions, first.data.num_heldout_functions = 64, 8
    for config in (first, second):
        config.run.device, config.train.compile, config.train.nonfinite = "cuda", False, "skip"
        config.train.validate_steps = config.train.plot_samples_steps = config.train.plot_graph_steps = 100
    auto = ["--config", write_config_file(first, tmp_path / "first.py")]
    both = ["--config", write_config_file(second, tmp_path / "second.py"), "--decoder_config", auto[1]]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    for script in (["train_inf_ae_diffusion.py", *auto], ["train_latent_diffusion.py", *both]):
        out = run({**environment, "NULLGPU_COUNT": str(ranks)}, *launch, "tests/nullgpu/steps.py", *script)
        assert last_step(out)[1] == 0
    if ranks == 1:
        sampling = ["--sampling_steps=2", "--num_samples=2", "--output"]
        for size in (16, 64):
            run(environment, "tests/nullgpu/steps.py", "experiments/generate_samples.py", *both,
                "--latent_sampling_steps=2", f"--sample_img_size={size}", *sampling, tmp_path / f"samples_{size}")
        run(environment, "tests/nullgpu/steps.py", "experiments/generate_recons.py", *auto, *sampling,
            tmp_path / "reconstructions")
