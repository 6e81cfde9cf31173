"""Running loops that numba compiles, on CPU tensors."""

import functools
import importlib
import logging
import pathlib
import threading

import torch

log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()  # a loop uses every core, and one of numba's threading layers is not thread-safe


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
    numba, kernel = _kernel(name)
    arguments = [_array(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    with _one_at_a_time:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        kernel(*arguments)


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
    torch.set_num_threads(threads)
    return numba, kernel
