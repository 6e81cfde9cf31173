"""What the compiled loops share. This folder is imported by models/compiled.py alone, and only where numba is."""

from numba import carray, njit, types
from numba.extending import intrinsic


def compiled(**options):
    """njit on all cores, kept on disk (NUMBA_CACHE_DIR, beside this file, or the user's cache folder)."""

    def decorate(function):
        try:
            return njit(parallel=True, nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it may write to
            return njit(parallel=True, nogil=True, **options)(function)

    return decorate


@njit(inline="always")
def array(address, shape, kind):
    """The contiguous numbers at an address, as an array of that shape; kind is any number of their type.

    Loops that a training step calls hundreds of times take addresses: to make arrays of their tensors in Python, and to
    look at each of these again, would take longer than many of the loops do. (Machine code that is kept on disk is not
    renewed when this file changes; delete models/loops/__pycache__ then.)
    """
    return carray(_pointer(address, kind), shape)


@intrinsic
def _pointer(context, address, kind):
    """An integer as a pointer to numbers of the type of `kind`."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind)(address, kind), code
