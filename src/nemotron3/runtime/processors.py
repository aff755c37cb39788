"""The number of processors that this process may use; the machine may have more.

The control group of a container has a quota of processor time, and each group above it may have a
smaller one (Linux, *Control Group v2*, `cpu.max`; in version 1 `cpu.cfs_quota_us` of every
`cpu.cfs_period_us`). PyTorch and OpenMP count the processors that threads may be scheduled on and
ignore quotas: with a quota of one processor on a machine of 64, their threads would use up the
quota in a sixty-fourth of each period and be stopped until the next.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from nemotron3.runtime.control_groups import PROCESS, group_folders, words


def processors() -> int:
    """Number of threads of this process that can run at the same time, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    may = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = cpu_quota()
    return may if quota is None else max(1, min(may, math.ceil(quota)))


def fit_pytorch() -> None:
    """Reduce PyTorch's number of threads to `processors()`, if it is larger.

    It is called once, when the first compiled operation is loaded; a program may set another number
    afterwards.
    """
    most = processors()
    if torch.get_num_threads() > most:
        torch.set_num_threads(most)


def cpu_quota(process: Path = PROCESS) -> float | None:
    """The quota of a process in processors, by its control groups; None without a quota.

    `process` is its folder in /proc, which lists its groups and its mounts.
    """
    folders = group_folders("cpu", process)
    return min((quota for folder in folders for quota in _quotas(folder)), default=None)


def _quotas(folder: Path) -> Iterator[float]:
    """The quota of a group's folder, in either version of control groups."""
    both = words(folder / "cpu.max")
    old = words(folder / "cpu.cfs_quota_us") + words(folder / "cpu.cfs_period_us")
    for quota in (both, old):
        if len(quota) == 2 and quota[0].isdecimal() and quota[1].isdecimal() and int(quota[1]):
            yield int(quota[0]) / int(quota[1])
