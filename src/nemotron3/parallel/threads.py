"""The threads that parallel regions of compiled code are done by.

The runtime of OpenMP gives every thread that starts a region a team of its own, and keeps it. Teams
wait for the next region spinning, until there are more threads in all of them than processors: then
they sleep, and short regions take as long as it takes to wake them.
"""

import ctypes
import os

_SOFT = 1
"""`omp_pause_soft`: what was set stays."""


def release_team() -> bool:
    """Give back the calling thread's team, as when another thread computes from now on.

    The next region that this thread starts makes a new one. Whether it was done: it is for GCC's
    runtime, which PyTorch brings along on Linux.
    """
    if not hasattr(os, "RTLD_NOLOAD"):
        return False
    try:
        runtime = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    pause = getattr(runtime, "omp_pause_resource_all", None)
    return pause is not None and pause(_SOFT) == 0
