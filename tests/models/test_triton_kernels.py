"""What can be known of the Triton kernels without a GPU: that they compile for one, and what they compute."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(params=[(80, "fp32"), (90, "bf16")], ids=["A100", "H100"])
def build(request, monkeypatch, tmp_path):
    """(dtype of the features, function that compiles a kernel). It returns the memory of each thread's own, in bytes:
    where that is not 0, registers are spilled."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        pytest.skip("an older Triton describes arguments in another way")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    architecture, dtype = request.param

    def compile_for_it(kernel, constants, types):
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places)
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])
        command = [pathlib.Path(nvidia.__file__).parent / "bin/cuobjdump", "--dump-resource-usage", "kernel.cubin"]
        usage = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+) ", usage).groups()
        return int(stack) + int(local)

    return dtype, compile_for_it


def test_the_operator_and_the_search_compile_for_a_gpu(build):
    from models.backends import _triton_kernels as kernels
    from models.backends._triton_nearest import nearest
    from models.backends.triton import CHANNELS, POINTS, SIDE
    from models.nearest import WARP

    dtype, compile_for_it = build
    window, side = {"KH": 7, "KW": 7}, SIDE[4 if dtype == "fp32" else 2]
    depthwise = {**window, "BLOCK_P": POINTS, "BLOCK_C": CHANNELS}
    full = {**window, "PRECISION": "ieee", "BLOCK_P": side, "BLOCK_I": side, "BLOCK_O": side}
    types = {
        **dict.fromkeys(("features", "grad", "weight"), f"*{dtype}"),
        "position": "*i32", "table": "*i32", "share": "*fp32",
        "padded": "*i32", "start": "*i64", "first": "*i64", "order": "*i64", "distance": "*fp32", "place": "*i64",
        "squared_distance": "*fp32",
    }  # fmt: skip
    for kernel, constants, out in [
        *[(kernels.depthwise, {**depthwise, "ADJOINT": adjoint}, f"*{dtype}") for adjoint in (False, True)],
        *[(kernels.full, {**full, "ADJOINT": adjoint}, f"*{dtype}") for adjoint in (False, True)],
        (kernels.depthwise_weight_gradient, depthwise, "*fp32"), (kernels.full_weight_gradient, full, "*fp32"),
        (nearest, {"G": 128, "K": 3, "BLOCK": WARP, "PIXELS": 8 * WARP}, ""),
    ]:  # fmt: skip
        assert compile_for_it(kernel, constants, {**types, "out": out}) == 0, kernel


def test_norms_compile_for_a_gpu(build):
    """Of 64 channels, and with all that may follow a norm."""
    from models.backends import _triton_normalisation as kernels
    from models.backends.triton_normalisation import NUMBERS, NUMBERS_BACKWARD

    dtype, compile_for_it = build
    types = {
        **dict.fromkeys(("x", "out", "grad", "grad_x"), f"*{dtype}"),
        **dict.fromkeys(("weight", "bias", "scale", "shift", "mean", "inverse", "partial"), "*fp32"),
        "eps": "fp32", "factor": "fp32",
    }  # fmt: skip
    for kernel, numbers in [(kernels.forward, NUMBERS), (kernels.backward, NUMBERS_BACKWARD)]:
        constants = {"GELU": True, "DROPOUT": True, "BLOCK_R": numbers // 64, "BLOCK_C": 64}
        assert compile_for_it(kernel, constants, types) == 0, kernel


def test_compute_what_they_should_in_the_interpreter():
    """Those tests and a decoder on CPU, in a process where Triton starts with its interpreter."""
    decoder = "tests/models/test_build.py::test_a_checkpoint_gives_the_same_on_every_backend[triton-{}]"
    tests = [f"tests/models/test_triton_{name}.py" for name in ("backend", "nearest", "normalisation")]
    tests += map(decoder.format, ("depthwise", "full"))
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout
