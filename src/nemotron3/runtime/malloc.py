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
"""Most free memory that the C library retains."""


def retain_freed_memory() -> bool:
    """Let glibc retain freed memory for later allocations, in one heap for all later threads.

    A thread that already has its own heap keeps it, and later threads may share that heap, where
    less is retained. So a program should call this before it starts threads, and before it imports
    NumPy or PyTorch, which start some: the `nemotron3` command calls it first.

    The setting applies to the whole process. Returns False if nothing was changed: other C
    libraries have no such setting, and a user's own MALLOC_… or GLIBC_TUNABLES has priority.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None:
        return False
    wanted = {_TRIM_THRESHOLD: _KEPT_BYTES, _MMAP_THRESHOLD: _KEPT_BYTES, _ARENA_MAX: 1}
    done = [set_option(option, value) for option, value in wanted.items()]
    return all(done)
