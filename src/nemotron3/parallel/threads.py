"""The threads that parallel regions of compiled code are done by.

The runtime of OpenMP gives every thread that starts a region a team of its own, and keeps it. Teams
wait for the next region spinning, until there are more threads in all of them than processors: then
they sleep, and short regions take as long as it takes to wake them.
"""

import ctypes
import os
from collections.abc import Sequence

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


def spread(threads: Sequence[int]) -> bool:
    """Keep each of a team's threads, by their numbers, on a processor of its own.

    A thread that waits for a part of the team looks busy, and two of them may be left on one
    processor for tens of milliseconds, waiting for each other in turns. It is done where there are
    as many threads as processors, which a team that large has to use all in any case; a smaller
    one is left to the system, since another program's may have been put on the same ones. Whether
    it was done.
    """
    if not hasattr(os, "sched_setaffinity"):
        return False
    processors = sorted(os.sched_getaffinity(0))
    if len(threads) < 2 or len(threads) != len(processors):
        return False
    try:
        for thread, processor in zip(threads, processors, strict=True):
            os.sched_setaffinity(thread, {processor})
    except PermissionError:  # a sandbox's rule: then as the system has it
        return False
    return True
