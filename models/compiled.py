"""Running loops that numba compiles, on CPU tensors."""

import functools
import importlib
import logging
import pathlib
import threading

import numpy as np
import torch

log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()  # a loop uses every core, and one of numba's threading layers is not thread-safe
_of_this_thread = threading.local()  # .threads: what numba was told last, which it keeps for each thread
_ZERO = {torch.float32: np.float32(0), torch.float64: np.float64(0), torch.bfloat16: np.uint16(0)}


@functools.cache
def unavailable_reason():
    """Why the compiled loops cannot be used and what to do; "" where they can."""
    try:
        import numba  # noqa: F401  # here, because it takes half a second and may be missing or refuse this numpy
    except ImportError as error:
        return f"numba cannot be imported ({error}); `pip install numba`, or use model.backend=torch_dense"
    return ""


def is_available():
    """Whether numba can be imported."""
    return not unavailable_reason()


def run(name, *arguments):
    """Call the compiled loop "file.function" of models/loops on numbers and CPU tensors, with as many threads as torch
    uses. A bfloat16 tensor comes to it as its bits, uint16."""
    call(name, *[_array(a) if isinstance(a, torch.Tensor) else a for a in arguments])


def call(name, *arguments):
    """run, for arguments without a tensor: those of loops that take addresses."""
    numba, kernel = _kernel(name)
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    with _one_at_a_time:
        if getattr(_of_this_thread, "threads", None) != threads:
            numba.set_num_threads(threads)
            _of_this_thread.threads = threads
        kernel(*arguments)


def addresses(*tensors):
    """Where contiguous CPU tensors begin in memory, for loops that take addresses (models.loops.common.array)."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("a loop would read a tensor that is not contiguous")
    return [tensor.data_ptr() for tensor in tensors]


def kind(dtype):
    """What tells a loop that takes addresses the type of the numbers there; bfloat16 comes as its bits, uint16."""
    return _ZERO[dtype]


def _array(tensor):
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@functools.cache
def _kernel(name):
    """(numba, the loop): it is compiled when first called, which takes some seconds, and read from disk thereafter."""
    import numba

    module, function = name.split(".")
    kernel = getattr(importlib.import_module(f"models.loops.{module}"), function)
    folder = kernel.stats.cache_path
    if folder is None or not any(pathlib.Path(folder).glob(f"{name}-*.nbc")):
        log.info("compiling %s for this CPU: some seconds, %s", name, "once" if folder else "as no folder is writable")
    threads = torch.get_num_threads()
    numba.set_num_threads(1)  # starts numba's threads, and where both use one OpenMP that changes the number of torch's
    _of_this_thread.threads = 1
    torch.set_num_threads(threads)
    return numba, kernel
