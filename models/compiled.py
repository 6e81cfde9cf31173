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
_of_this_thread = threading.local()  # .threads: what numba was told here last; it keeps a number for each thread
_ZERO = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}
DTYPES = tuple(_ZERO)  # of features, in loops that take addresses


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
    _call(name, [_array(a) if isinstance(a, torch.Tensor) else a for a in arguments])


def run_at(name, tensors, *numbers):
    """run for loops that take addresses of tensors (models.loops.common.array), which come first, then numbers.

    tensors   (dtype, tensor, tensor, ...), ... . They are named here, and not the addresses of them, so that none of
              them can be freed before the loop is done
    Raises ValueError for a tensor that the loop would misread: of another dtype, not contiguous, or not on the CPU.
    """
    _call(name, [*addresses(tensors), *numbers])


def addresses(tensors):
    """Where tensors that run_at takes are; for those that outlive many calls, and are then numbers in each of them."""
    return [_address(tensor, dtype) for dtype, *group in tensors for tensor in group]


def _call(name, arguments):
    numba, kernel = _kernel(name)
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    with _one_at_a_time:
        if getattr(_of_this_thread, "threads", None) != threads:
            numba.set_num_threads(threads)
            _of_this_thread.threads = threads
        kernel(*arguments)


def _address(tensor, dtype):
    if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"a loop would misread a tensor of {tensor.dtype} on {tensor.device} with strides "
                         f"{tensor.stride()}, instead of a contiguous one of {dtype} on the CPU")
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(f"a loop was given a tensor without numbers, {type(tensor).__name__}")
    return address


def kind(dtype):
    """A zero, which tells a loop that takes addresses the type of the numbers there: float32, or uint16 for the bits
    of bfloat16."""
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
