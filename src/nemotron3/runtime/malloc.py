"""The C library's heap, from which tensors on the CPU are allocated.

Activations are freed within milliseconds. By default the C library returns their memory to the
system and requests it again for the next layer, page by page.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Parameters of glibc's `mallopt`."""
_KEPT_BYTES = 2**30
"""Free memory beyond which the C library may return some."""


def retain_freed_memory() -> bool:
    """Have glibc keep freed memory for what comes next, in one heap for all threads to come.

    Threads that have a heap of their own by now keep it, and those to come may share it, where less
    is kept. So a program calls this before anything starts a thread, as importing NumPy or PyTorch
    does: the `nemotron3` command does so first of all.

    It concerns the whole process, so it is for those who own its loop. Whether it was done: other C
    libraries have no such settings, and who has set MALLOC_… or GLIBC_TUNABLES is left alone.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None:
        return False
    wanted = {_TRIM_THRESHOLD: _KEPT_BYTES, _MMAP_THRESHOLD: _KEPT_BYTES, _ARENA_MAX: 1}
    done = [set_option(option, value) for option, value in wanted.items()]
    return all(done)
