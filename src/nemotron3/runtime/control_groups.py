"""The folders of a process's control groups, in either version of control groups.

Limits of a container are limits of its group, or of a group above it: whoever asks for one reads
all of these folders (Linux, *Control Group v2*).
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")


def group_folders(controller: str, process: Path = PROCESS) -> list[Path]:
    """The folders of the group that a controller (`cpu`, `memory`) has the process in, and above.

    `process` is its folder in /proc, which lists its groups and its mounts. Empty where there are
    no control groups.
    """
    try:
        groups = (process / "cgroup").read_text()
        mounts = (process / "mountinfo").read_text()
    except OSError:  # not Linux, or a sandbox that hides it
        return []
    return list(_folders(controller, groups, mounts))


def words(path: Path) -> list[str]:
    """The words of a group's file; none where there is no such file."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def _folders(controller: str, groups: str, mounts: str) -> Iterator[Path]:
    paths: dict[str, str] = {}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in mounts.splitlines():
        fields, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and controller not in options.split(",")):
            continue
        root, point = map(_unescaped, fields.split(" ")[3:5])
        group = PurePosixPath(paths[kind])
        # A container sees a part of the tree; a group outside of it is reported as /../other.
        inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
        folder = Path(point) / inside
        yield folder
        yield from (Path(point) / above for above in inside.parents)


def _unescaped(field: str) -> str:
    """A field of mountinfo, which writes blanks as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
