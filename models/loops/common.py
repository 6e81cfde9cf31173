"""What the compiled loops share. This folder is imported by models/compiled.py alone, and only where numba is."""

from numba import njit


def compiled(**options):
    """njit on all cores, kept on disk (NUMBA_CACHE_DIR, beside this file, or the user's cache folder)."""

    def decorate(function):
        try:
            return njit(parallel=True, nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it may write to
            return njit(parallel=True, nogil=True, **options)(function)

    return decorate
