"""What the compiled loops share. This folder is imported by models/compiled.py alone, and only where numba is."""

from numba import njit, prange


def compiled(**options):
    """njit on all cores, kept on disk (NUMBA_CACHE_DIR, beside this file, or the user's cache folder)."""

    def decorate(function):
        try:
            return njit(parallel=True, nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it may write to
            return njit(parallel=True, nogil=True, **options)(function)

    return decorate


@njit(parallel=True)
def add_up(partial, out):
    """out = sum of partial [chunks, taps, C] over the chunks, in order."""
    chunks, taps, channels = partial.shape
    for tap in prange(taps):
        out[tap] = 0
        for chunk in range(chunks):
            for c in range(channels):
                out[tap, c] += partial[chunk, tap, c]
