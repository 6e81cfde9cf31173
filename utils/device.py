"""Device, precision and memory of a run, and the environment recorded with its results."""

import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from utils import distributed
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PACKAGES = ("torch", "numpy", "scipy", "numba", "ml_collections", "Pillow", "scikit-image", "safetensors")


def resolve_device(name):
    """torch.device of run.device. auto takes a GPU if there is one; each of several ranks takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.world_size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise UserError(f"run.device={name!r} would put {distributed.world_size()} processes on one GPU; use cuda")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"run.device={name!r} must be auto, cpu, cuda or cuda:<number>")
    if device.type == "cpu":
        _keep_freed_memory()
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"run.device={name!r} is not on this machine ({torch.cuda.device_count()} GPUs found); "
                        "use run.device=auto, and at most as many processes as GPUs")
    if device.index is not None:
        torch.cuda.set_device(device)  # the default of streams, kernels and new buffers
    torch.backends.cudnn.benchmark = True
    if os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions
    return device


def _keep_freed_memory():
    """Have glibc keep freed memory for the next step instead of returning it to the kernel, whose page faults cost 5 to
    12 % of a training step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        _ = mallopt(-3, 2**28) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; some versions allow 32 MB at most
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def resolve_dtype(train, device):
    """Autocast dtype of the train section: `precision`, or float32 if `amp` is off.

    auto takes bf16 where the hardware supports it (also CPUs with avx512_bf16 or amx), else fp16 on a GPU, else fp32.
    """
    if not train.amp:
        return torch.float32
    if train.precision == "auto":
        return DTYPES[_best_precision(device)]
    if train.precision == "fp16" and device.type == "cpu":
        raise UserError("train.precision='fp16' needs a GPU; on a CPU use bf16, fp32 or auto")
    return DTYPES[train.precision]


def _best_precision(device):
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _cpu_has_bf16() else "fp32"


@functools.cache
def _cpu_has_bf16():
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # absent in some builds of torch
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def use_deterministic_algorithms():
    """Switch to PyTorch's deterministic algorithms. It warns of an operation that has none on this device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    torch.backends.cudnn.benchmark = False  # it may choose another algorithm in every run
    torch.use_deterministic_algorithms(True, warn_only=True)


def autocast(device, dtype):
    """Context of mixed precision: torch.autocast, or nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class _Cast(torch.autograd.Function):
    """(dtype, *weights) -> weights in that dtype; the gradients arrive in the dtype of the weights."""

    @staticmethod
    def forward(ctx, dtype, *weights):
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return tuple(_cast(weights, dtype))

    @staticmethod
    def backward(ctx, *gradients):
        full = iter(_cast([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return None, *(gradient if gradient is None else next(full) for gradient in gradients)


def _cast(tensors, dtype):
    """Copies of all tensors in a dtype, by a few kernels for all of them."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def in_training(network, dtype, compiled):
    """The network as a function of its inputs, as training calls it: compiled whole, and with half-precision weights.

    Autocast would cast the weight and the bias of every Linear and convolution layer by a kernel of its own, and their
    gradients. Here each call casts all of them at once, with the same results. They are cast in the call, and not
    earlier, so that the gradients of one network are averaged over the ranks while another's are computed.
    """
    function = _compiled(network) if compiled else network
    places = [(layer._parameters, name) for layer in network.modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
              for name, weight in layer._parameters.items() if weight is not None]
    if dtype == torch.float32 or not places:
        return function

    def call(*arguments, **options):
        weights = [parameters[name] for parameters, name in places]
        _set(places, _Cast.apply(dtype, *weights))
        try:
            return function(*arguments, **options)
        finally:
            _set(places, weights)

    return call


def _set(places, tensors):
    for (parameters, name), tensor in zip(places, tensors, strict=True):
        parameters[name] = tensor


def _compiled(network):
    from torch._dynamo import config as dynamo  # imported on demand: it takes a second
    from torch._functorch import config as functorch

    for config, option, value in (
            (dynamo, "optimize_ddp", False),  # it would cut the graph into the buckets of gradients
            # With activation checkpointing, the forward pass alone caches the geometry of the coordinates.
            (dynamo, "skip_fwd_side_effects_in_bwd_under_checkpoint", True),
            # It seeds dropout once per process and not at every step, so that a resumed run would drop other features.
            (functorch, "graphsafe_rng_functionalization", False)):
        if hasattr(config, option):  # older versions of PyTorch lack some
            setattr(config, option, value)
    return torch.compile(network, fullgraph=True, dynamic=False)


def resolve_compile(train, device):
    """Whether to compile the networks: train.compile; auto means on a GPU on which Triton can start kernels."""
    return device.type == "cuda" and not triton_problem() if train.compile == "auto" else train.compile


@functools.cache
def triton_problem():
    """Why Triton cannot start kernels here and what to do; "" if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with PyTorch for Linux); use model.backend=auto"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU; use model.backend=auto"
    from triton.runtime import driver  # imported on demand: Triton may be missing

    try:
        driver.active.utils  # noqa: B018  # compiles a part of Triton when it is first read
    except (AssertionError, RuntimeError, OSError, subprocess.CalledProcessError) as error:  # it raises all of these
        problem = (f"Triton cannot start kernels ({' '.join(str(error).split())[:100]}); it needs libcuda.so, a C "
                   "compiler and Python's headers (Debian: gcc, python3-dev)")
        logging.warning("%s. Until then the slower torch_dense is used", problem)
        return problem
    return ""


def peak_memory_gb(device):
    """Peak memory in 10^9 bytes: of this process's tensors on a GPU, or of the whole process on a CPU. 0 on Windows
    without a GPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(peak.split()[1]) * 1024 / 1e9, 3)
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


@functools.cache
def environment():
    """{"python", "packages": {name: version}, "commit", "machine"}, recorded with every result.

    Packages that are not installed are left out. The commit is "" outside a git checkout and ends in "-dirty" if
    tracked files have changed.
    """
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "packages": packages, "commit": _commit(),
            "machine": _machine()}


def _commit():
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=ROOT,
                               capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _machine():
    """System, processor, cores, and the GPUs if this process uses any."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [platform.platform(terse=True), f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"]
    if torch.cuda.is_initialized():  # initialising it would take memory on a GPU that the run may not use
        parts += [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return "; ".join(parts)
