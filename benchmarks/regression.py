"""Compare the speed of this checkout with that of another commit, row by row.

    python -m benchmarks.regression --against COMMIT
    python -m benchmarks.regression --against COMMIT --models 30m-latent --rows "train 512"

The other commit is checked out beside this one, and each is timed by its own process, which runs
until the end. In a pair both have their turn one after the other, in alternating order, so a slow
minute of the machine affects both; of a turn's repetitions the fastest counts. A row's figure is
the median of the pairs' ratios, the time of the other commit divided by the time of this one (above
1: this one is faster), with its 95% bootstrap interval. A row passes if that interval reaches 0.97.
Results go to benchmarks/results/.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.timing import PAUSE_S, turns

from benchmarks import machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORKER = Path(__file__).with_name("regression_worker.py")
ROWS = {
    "tiny": ("train 256", "prefill 2048", "decode 1", "decode 8", "engine 64"),
    "30m-latent": ("train 512", "prefill 512", "prefill 4096", "decode 1", "decode 8", "engine 64"),
    "30m-standard": ("train 512", "prefill 512", "decode 1"),
    "150m-latent": ("train 512", "prefill 512", "decode 1"),
}
"""The timed rows of each model: a kind of workload, and its length or batch size."""
PAIRS = 11
LOWEST = 0.97
"""A row passes if the interval of its ratio reaches this value."""
HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}
"""In both checkouts the C library retains freed memory, as for the package's commands."""


class Worker:
    """A process that times rows in one checkout."""

    def __init__(self, checkout: Path, threads: int) -> None:
        paths = os.pathsep.join([str(checkout), str(checkout / "src")])
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(threads)],
            env=os.environ | HEAP | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def turn(self, model: str, row: str) -> float:
        """Seconds of one turn."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{model}|{row}\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process that times {model}, {row} has ended; see its message")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary folder with the files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit, "src", "benchmarks"], cwd=ROOT, capture_output=True
        )
        if archive.returncode:
            raise SystemExit(f"git knows no commit {commit!r}: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def median_interval(ratios: Sequence[float], *, draws: int = 10_000) -> tuple[float, float]:
    """The 95% bootstrap interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[round(0.025 * draws)], medians[round(0.975 * draws) - 1]


def measure_row(workers: dict[str, Worker], model: str, row: str, *, pairs: int) -> dict[str, Any]:
    """One row: the seconds of both checkouts in every pair, and their ratio."""
    for worker in workers.values():
        worker.turn(model, row)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for order in turns(list(workers), rounds=pairs):
        for name in order:
            time.sleep(PAUSE_S)
            seconds[name].append(workers[name].turn(model, row))
    ratios = [old / new for old, new in zip(seconds["other"], seconds["this"], strict=True)]
    low, high = median_interval(ratios)
    return {
        "model": model,
        "row": row,
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "interval": [low, high],
        "passes": high >= LOWEST,
    }


def row_line(figure: dict[str, Any]) -> str:
    """A row as a line of text."""
    low, high = figure["interval"]
    verdict = "" if figure["passes"] else "   SLOWER"
    span = f"{figure['ratio']:.3f} ({low:.3f} to {high:.3f})"
    return f"{figure['model']:14}{figure['row']:14}{span}{verdict}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--models", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rows", nargs="+", help="only these, as 'train 512'")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args(arguments)
    load = machine.load_average()
    machine.warn_if_busy(load)
    figures: list[dict[str, Any]] = []
    with checked_out(options.against) as other:
        workers = {
            name: Worker(folder, options.threads)
            for name, folder in (("this", ROOT), ("other", other))
        }
        try:
            for model in options.models:
                for row in options.rows or ROWS[model]:
                    figures.append(measure_row(workers, model, row, pairs=options.pairs))
                    print(row_line(figures[-1]), flush=True)
        finally:
            for worker in workers.values():
                worker.close()
    about = machine.description()
    for figure in figures:  # a file may come to hold rows of several
        figure["commit"] = about["commit"]
    write(
        {
            "command": machine.command("benchmarks.regression"),
            "date": date.today().isoformat(),
            "against": options.against,
            "machine": about | {"load_before": load, "load_after": machine.load_average()},
            "figures": figures,
        },
        options.out,
    )
    slower = [figure for figure in figures if not figure["passes"]]
    if slower:
        raise SystemExit(f"{len(slower)} of {len(figures)} rows are slower than {options.against}")


def write(result: dict[str, Any], folder: Path) -> Path:
    """Save a result under the processor's name and the date; rows of the same day are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"regression-{machine.processor_name()}-{result['date']}.json"
    if path.exists():
        old = json.loads(path.read_text())
        if old["against"] == result["against"]:
            fresh = {(figure["model"], figure["row"]) for figure in result["figures"]}
            kept = [f for f in old["figures"] if (f["model"], f["row"]) not in fresh]
            result["figures"] = kept + result["figures"]
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}")
    return path


if __name__ == "__main__":
    main()
