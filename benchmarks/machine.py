"""The limits of the machine, and its load.

Every speed is compared with a limit that is measured in the same run: the rate of a large matrix
product if arithmetic limits it, the bandwidth of reading memory if memory does. Both depend on the
other virtual machines of the host, so they are measured before and after, and the best counts. The
product is the faster one of PyTorch's library and our own; the library's rate is recorded, too.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import Contestant
from torch import Tensor

from nemotron3.models.allocation import large_pages
from nemotron3.ops.linear import linear
from nemotron3.runtime.devices import measure_product_rate, processor_model

BUSY = 1.5
"""Load average from which measurements are reported as noisy."""


READ_MEGABYTES = 256
"""Memory that is read to measure the bandwidth: more than the caches hold."""

MOMENT = 0.1
"""Seconds of a limit's measurement between other contestants' turns."""


def limits(*, megabytes: int = READ_MEGABYTES, seconds: float = 1.0) -> dict[str, float]:
    """FLOP/s of a product, bytes/s of reading and of copying (which counts reads and writes)."""
    values = _values(megabytes)
    target = torch.empty_like(values)
    size = values.numel() * values.element_size()
    library, own = _product_rates(seconds)
    return {
        "product_flops_per_s": max(library, own),
        "library_product_flops_per_s": library,
        "read_bytes_per_s": size / _best_s(lambda: values.sum(), seconds),
        "copy_bytes_per_s": 2 * size / _best_s(lambda: target.copy_(values), seconds),
    }


def limit_now(name: str) -> Contestant:
    """Seconds of one unit of a limit, a FLOP or a byte.

    It takes turns with the contestants, because on a shared host the bandwidth may halve within a
    minute.
    """
    values = _values(READ_MEGABYTES)

    def run() -> float:
        if name == "read_bytes_per_s":
            return _best_s(lambda: values.sum(), MOMENT) / (values.numel() * values.element_size())
        return 1 / max(_product_rates(MOMENT))

    return run


def _values(megabytes: int) -> Tensor:
    """Numbers in large pages, like weights, because these are read faster than small pages."""
    return torch.frombuffer(large_pages(megabytes << 20), dtype=torch.float32).fill_(1.0)


def _product_rates(seconds: float) -> tuple[float, float]:
    """FLOP/s of PyTorch's library and of our own product."""
    library, own = (
        measure_product_rate(torch.device("cpu"), torch.float32, product=product, seconds=seconds)
        for product in (torch.mm, linear)
    )
    return library, own


def best_of(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """The better of two measurements of each limit."""
    return {name: max(value, b[name]) for name, value in a.items()}


def description() -> dict[str, Any]:
    """The machine and the versions of the programs."""
    return {
        "cpu": processor_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
        "commit": _commit(),
    }


def processor_name(described: str | None = None) -> str:
    """The processor's vendor and model, as a part of file names."""
    words = re.sub(r"\(.*?\)", "", described or processor_model()).lower().split()
    return "-".join(words[:2])


def command(module: str, arguments: Sequence[str] | None = None) -> str:
    """The command that produced a result, for repeating it.

    Of paths outside this folder it has only the last two parts, and it omits the folder of the
    results, because both are specific to this machine.
    """
    said = list(sys.argv[1:] if arguments is None else arguments)
    if "--out" in said:
        at = said.index("--out")
        del said[at : at + 2]
    parts = [
        "/".join(["PATH_TO", *Path(word).parts[-2:]]) if Path(word).is_absolute() else word
        for word in said
    ]
    return " ".join([f"python -m {module}", *parts])


def write_result(
    name: str,
    measured: Mapping[str, Any],
    *,
    arguments: Sequence[str] | None,
    about: Mapping[str, Any] | None = None,
    folder: Path,
) -> Path:
    """Write what `benchmarks.NAME` measured, with the date, the command and the machine.

    `about` is more to say of the machine, such as its load.
    """
    today = date.today().isoformat()
    result = {
        "date": today,
        "command": command(f"benchmarks.{name}", arguments),
        "machine": description() | dict(about or {}),
        **measured,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{processor_name()}-{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def installed(package: str) -> str:
    """The version of a package, or a note that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def load_average() -> float:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def warn_if_busy(load: float) -> None:
    """Print a warning if other programs use the machine."""
    if load > BUSY:
        print(f"WARNING: the load average is {load}; figures of a busy machine are noise\n")


class OtherPrograms:
    """Which share of the processors other programs take, from its creation on.

    A comparison in which threads wait for each other says nothing while another program computes:
    some waiting threads keep a processor busy, and the one they wait for does not get it.
    """

    def __init__(self) -> None:
        self._start, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """The mean share so far, of all processors, with children that have ended counted as ours.

        None where the system does not say.
        """
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        seconds = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        others = busy - self._busy - (_own_seconds() - self._own)
        return max(0.0, others / seconds)


def _busy_seconds() -> float | None:
    """Seconds for which the processors have worked since the start of the system."""
    file = Path("/proc/stat")
    if not file.exists():
        return None
    ticks = [int(word) for word in file.read_text().split("\n")[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, softirq, stolen = ticks[:8]
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _best_s(action: Callable[[], object], seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best


def _commit() -> str:
    """The commit, with a plus if the package's files differ from it.

    Without a repository it is a digest of the files, by which a commit can be identified.
    """
    here = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if not (here.parent / ".git").exists() or not shutil.which("git"):
        return f"of the sources {_digest(here.parent / 'src')}"
    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("diff", "HEAD", "--", "../src") else ""
    )


def _digest(folder: Path) -> str:
    """Digest of all Python files in a folder, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def limits_in_words(limits: dict[str, float]) -> str:
    """The limits as text, for tables and the page."""
    return (
        f"product {limits['product_flops_per_s'] / 1e9:.0f} GFLOP/s "
        f"({limits['library_product_flops_per_s'] / 1e9:.0f} in PyTorch's library), "
        f"read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s"
    )
