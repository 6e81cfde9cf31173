"""What the compiled loops share. This folder is imported by models/compiled.py alone, and only where numba is.

Machine code that is kept on disk is compiled anew when the file of the loop itself changes, not when this one does or
another that the loop takes functions from: delete it then (models/loops/__pycache__, or the folder NUMBA_CACHE_DIR).
"""

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic, overload

BLOCK = 4096  # numbers that one thread takes at a time; the order of sums depends on it, never on the number of threads
REDUCE = {"contract", "reassoc", "nsz"}  # sums in any order; NaN and infinity stay what they are
VECTOR = {"fastmath": REDUCE, "error_model": "numpy"}  # the error model of Python tests every division for zero

u16, u32, u64 = np.uint16, np.uint32, np.uint64


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
    look at each of these again, would take longer than many of the loops do.
    """
    return carray(_pointer(address, kind), shape)


@intrinsic
def _pointer(context, address, kind):
    """An integer as a pointer to numbers of the type of `kind`."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind)(address, kind), code


@intrinsic
def lowest_bit(context, number):
    """Which bit of an unsigned number, which is not zero, is the lowest that is set, int64."""

    def code(context, builder, signature, arguments):
        bit = builder.cttz(arguments[0], context.get_constant(types.boolean, True))
        return context.cast(builder, bit, number, types.int64)

    return types.int64(number), code


def convert(source, target):
    """target = source, either in float32 or bfloat16, to which it is rounded to the nearest, ties to even."""


@overload(convert)
def _convert(source, target):
    """The code for the types of the arrays."""
    if source.dtype == types.uint16:

        def code(source, target):
            bits = target.view(np.uint32)
            for i in range(source.size):
                bits[i] = u32(source[i]) << u32(16)

    elif target.dtype == types.uint16:

        def code(source, target):
            bits = source.view(np.uint32)
            for i in range(source.size):
                rounded = (bits[i] + u32(0x7FFF) + ((bits[i] >> u32(16)) & u32(1))) >> u32(16)
                target[i] = u16(rounded) if source[i] == source[i] else u16(0x7FC0)

    else:

        def code(source, target):
            for i in range(source.size):
                target[i] = source[i]

    return code
