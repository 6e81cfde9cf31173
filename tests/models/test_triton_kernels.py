"""What can be known of the Triton kernels without a GPU: that they compile for one, and what they compute."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16")])  # A100, H100
def test_compile_for_a_gpu(capability, dtype, monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.backends import _triton_kernels as kernels
    from models.backends.triton import CHANNELS, POINTS, SIDE

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        pytest.skip("an older Triton describes arguments in another way")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    side = SIDE[4 if dtype == "fp32" else 2]
    depthwise = {"KH": 7, "KW": 7, "BLOCK_P": POINTS, "BLOCK_C": CHANNELS}
    full = {"KH": 7, "KW": 7, "PRECISION": "tf32", "BLOCK_P": side, "BLOCK_I": side, "BLOCK_O": side}
    types = {"pixels": "*i32", "table": "*i32", "counts": "*fp32", "features": f"*{dtype}", "grad": f"*{dtype}"}
    for kernel, constants in [
        (kernels.depthwise, {**depthwise, "ADJOINT": False}), (kernels.depthwise, {**depthwise, "ADJOINT": True}),
        (kernels.full, {**full, "ADJOINT": False}), (kernels.full, {**full, "ADJOINT": True}),
        (kernels.depthwise_weight_gradient, depthwise), (kernels.full_weight_gradient, full),
    ]:
        gradient = "weight_gradient" in kernel.fn.__name__
        types["weight"] = "*fp32" if kernel is kernels.depthwise else f"*{dtype}"
        types["out"] = "*fp32" if gradient else f"*{dtype}"
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def test_compute_the_operator_in_the_interpreter():
    """test_triton_backend.py and a decoder on CPU, in a process where Triton starts with its interpreter."""
    decoder = "tests/models/test_build.py::test_a_checkpoint_gives_the_same_on_every_backend[triton-{}]"
    tests = ["tests/models/test_triton_backend.py", *map(decoder.format, ("depthwise", "full"))]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout
