"""The Triton kernels without a GPU: that they compile for one, and their results in the interpreter."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(params=[(80, "fp32"), (90, "bf16")], ids=["A100", "H100"])
def build(request, monkeypatch, tmp_path):
    """(dtype of the features, function that compiles a kernel and returns the bytes of spilled registers)."""
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        pytest.skip("older versions of Triton describe arguments in another way")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    architecture, dtype = request.param

    def compile_kernel(kernel, constants, types, **options):
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places)
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])
        command = [pathlib.Path(nvidia.__file__).parent / "bin/cuobjdump", "--dump-resource-usage", "kernel.cubin"]
        usage = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+) ", usage).groups()
        return int(stack) + int(local)

    return dtype, compile_kernel


def test_all_kernels_compile_for_a_gpu_without_spilling_registers(build):
    from models.interpolation import TIES
    from models.kernels import gpu_kernels as kernels
    from models.kernels.gpu import CHANNELS, PIXELS, POINTS, REACH, SIDE

    dtype, compile_kernel = build
    window, side = {"KH": 7, "KW": 7}, SIDE[4 if dtype == "fp32" else 2]
    depthwise = {**window, "BLOCK_P": POINTS, "BLOCK_C": CHANNELS}
    full = {**window, "PRECISION": "ieee", "BLOCK_P": side, "BLOCK_I": side, "BLOCK_O": side}
    types = {**dict.fromkeys(("features", "grad", "weight", "out"), f"*{dtype}"), "position": "*i32", "table": "*i32",
             "place": "*i64", "squared_distance": "*fp32"}
    partial = {**types, "out": "*fp32"}
    search = {"G": 128, "K": 3, "SLOTS": 3 + TIES, "REACH": REACH, "SIDE": 16, "PIXELS": PIXELS}
    assert compile_kernel(kernels.depthwise, depthwise, types) == 0
    assert compile_kernel(kernels.full, full, types) == 0
    assert compile_kernel(kernels.depthwise_weight_gradient, depthwise, partial) == 0
    assert compile_kernel(kernels.full_weight_gradient, full, partial) == 0
    assert compile_kernel(kernels.nearest, search, types, num_warps=1) == 0


def test_all_kernels_compute_the_right_results_in_the_interpreter():
    """In a process of its own, because Triton chooses its interpreter when it is imported."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/models/test_triton.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout and "passed" in result.stdout
