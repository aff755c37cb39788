"""The number of processors that this process may use; the machine may have more.

The control group of a container has a quota of processor time, and each group above it may have a
smaller one (Linux, *Control Group v2*, `cpu.max`; in version 1 `cpu.cfs_quota_us` of every
`cpu.cfs_period_us`). PyTorch and OpenMP count the processors that threads may be scheduled on and
ignore quotas: with a quota of one processor on a machine of 64, their threads would use up the
quota in a sixty-fourth of each period and be stopped until the next.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

PROCESS = Path("/proc/self")


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
    try:
        groups = (process / "cgroup").read_text()
        mounts = (process / "mountinfo").read_text()
    except OSError:  # not Linux, or a sandbox that hides it
        return None
    quotas = [quota for folder in _folders(groups, mounts) for quota in _quotas(folder)]
    return min(quotas, default=None)


def _folders(groups: str, mounts: str) -> Iterator[Path]:
    """The folders of the process's control group for processors, and of the groups above it."""
    paths: dict[str, str] = {}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in mounts.splitlines():
        fields, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        root, point = map(_unescaped, fields.split(" ")[3:5])
        group = PurePosixPath(paths[kind])
        # A container sees only a part of the tree; a group outside it is reported as /../other.
        inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
        folder = Path(point) / inside
        yield folder
        yield from (Path(point) / above for above in inside.parents)


def _unescaped(field: str) -> str:
    """Decode a field of mountinfo, which writes blanks as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _quotas(folder: Path) -> Iterator[float]:
    """The quota of a group's folder, in either version of control groups."""
    both = _words(folder / "cpu.max")
    old = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
    for words in (both, old):
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
            yield int(words[0]) / int(words[1])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
