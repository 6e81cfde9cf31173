"""What can be known of the Triton kernels without a GPU: that they compile for one, and what they compute."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(("architecture", "dtype"), [(80, "fp32"), (90, "bf16")])
def test_compile_for_a_gpu(monkeypatch, tmp_path, architecture, dtype):
    """For an A100 and an H100, and without memory of a thread's own, for that is where registers are spilled."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.backends import _triton_kernels as kernels
    from models.backends._triton_nearest import nearest
    from models.backends.triton import CHANNELS, POINTS, SIDE
    from models.nearest import WARP

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        pytest.skip("an older Triton describes arguments in another way")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    depthwise = {"KH": 7, "KW": 7, "BLOCK_P": POINTS, "BLOCK_C": CHANNELS}
    side = SIDE[4 if dtype == "fp32" else 2]
    full = {"KH": 7, "KW": 7, "PRECISION": "ieee", "BLOCK_P": side, "BLOCK_I": side, "BLOCK_O": side}
    types = {
        **dict.fromkeys(("features", "grad", "weight"), f"*{dtype}"),
        "position": "*i32", "table": "*i32", "share": "*fp32",
        "padded": "*i32", "start": "*i64", "first": "*i64", "order": "*i64", "distance": "*fp32", "place": "*i64",
        "squared_distance": "*fp32",
    }  # fmt: skip
    for kernel, constants in [
        (kernels.depthwise, {**depthwise, "ADJOINT": False}), (kernels.depthwise, {**depthwise, "ADJOINT": True}),
        (kernels.full, {**full, "ADJOINT": False}), (kernels.full, {**full, "ADJOINT": True}),
        (kernels.depthwise_weight_gradient, depthwise), (kernels.full_weight_gradient, full),
        (nearest, {"G": 128, "K": 3, "BLOCK": WARP, "PIXELS": 8 * WARP}),
    ]:  # fmt: skip
        types["out"] = "*fp32" if "weight_gradient" in kernel.fn.__name__ else f"*{dtype}"
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places)
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])
        command = [pathlib.Path(nvidia.__file__).parent / "bin/cuobjdump", "--dump-resource-usage", "kernel.cubin"]
        usage = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_norms_compile_for_a_gpu(capability, dtype, monkeypatch, tmp_path):
    """For an A100 and an H100, of 64 channels and with all that may follow a norm."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.backends import _triton_normalisation as kernels
    from models.backends.triton_normalisation import NUMBERS, NUMBERS_BACKWARD

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        pytest.skip("an older Triton describes arguments in another way")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {name: f"*{dtype}" for name in ("x", "out", "grad", "grad_x")}
    types |= {name: "*fp32" for name in ("weight", "bias", "scale", "shift", "mean", "inverse", "partial")}
    types |= {"eps": "fp32", "factor": "fp32"}
    for kernel, numbers in [(kernels.forward, NUMBERS), (kernels.backward, NUMBERS_BACKWARD)]:
        constants = {"GELU": True, "DROPOUT": True, "BLOCK_R": numbers // 64, "BLOCK_C": 64}
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


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
