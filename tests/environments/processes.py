"""Looking at the processes of the machine."""

import time
from pathlib import Path

_PATIENCE_S = 60


def descendants(pid):
    """The processes that descend from one, by number, without those that have ended."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if stat[0] != "Z":
                parents[int(entry.name)] = int(stat[1])
    found = {pid}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return found - {pid}


def exist(pids):
    """Whether one of these processes is there still, ended or not."""
    return any(Path(f"/proc/{pid}").exists() for pid in pids)


def until(holds):
    """Wait for what the kernel does in its own time; it fails where that never comes."""
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
