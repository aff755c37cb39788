"""The speed of programs that share a machine, relative to running alone.

    python -m benchmarks.sharing

Prompts, decoding and training run beside programs that keep a processor busy, beside each other,
and with a quota of one processor (in a new control group, if one can be created). Every line is the
speed as a share of the speed alone, which is measured again before each; for several programs it is
the sum of the shares. The model is the preset `tiny` with its initial weights.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.models import objective_of
from benchmarks.timing import turns

from benchmarks import machine
from nemotron3 import EngineConfig, LanguageModel, ModelConfig, SamplingParams
from nemotron3.inference.engine import Engine
from nemotron3.inference.sequences import EngineRequest
from nemotron3.ops.segments import Segments
from nemotron3.training.batch import TrainBatch
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep

RESULTS = Path(__file__).parent / "results"
KINDS = ("prompts", "decoding", "training")
GROUPS = {
    "two trainings": ("training",) * 2,
    "two engines": ("decoding",) * 2,
    "a training, an engine": ("training", "decoding"),
    "four trainings": ("training",) * 4,
    "four engines": ("decoding",) * 4,
    "two trainings, two engines": ("training",) * 2 + ("decoding",) * 2,
}
BUSY = (1, 2)
"""Numbers of programs that each keep a processor busy."""
QUOTA = "a quota of one processor"
CONTROL_GROUPS = Path("/sys/fs/cgroup")


def work(kind: str) -> Callable[[], int]:
    """A function that does some work of this kind and returns the number of tokens."""
    model = LanguageModel.from_config(ModelConfig.preset("tiny"), seed=0)
    if kind == "training":
        return _training(model)
    rows, length, new = (1, 2048, 2) if kind == "prompts" else (8, 64, 64)
    config = EngineConfig(max_num_seqs=rows, max_model_len=4096, prefix_cache_bytes=0)
    engine, numbers, vocab = Engine(model, config), itertools.count(), model.config.vocab_size
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)

    def some() -> int:
        for _ in range(rows):
            number = next(numbers)
            draw = torch.Generator().manual_seed(number)
            prompt = tuple(torch.randint(3, vocab, (length,), generator=draw).tolist())
            engine.add(EngineRequest(request_id=str(number), prompt=prompt, params=params))
        while engine.has_work:
            engine.step()
        return length if kind == "prompts" else rows * new

    return some


def _training(model: LanguageModel) -> Callable[[], int]:
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-4))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (2049,), generator=draw)
    batch = TrainBatch(
        tokens=tokens[:-1],
        targets=tokens[1:],
        mask=torch.ones(2048),
        segments=Segments([256] * 8),
    )
    update = TrainingStep(model, optimizer, objective_of(model), clip_grad_norm=1.0)

    def some() -> int:
        update([batch], learning_rate=1e-4)
        return 2048

    return some


def work_when_told(kind: str) -> None:
    """The main function of a worker: each input line is a number of seconds; it works and answers
    with its rate."""
    some = work(kind)
    for _ in range(3):
        some()
    print("ready", flush=True)
    for line in sys.stdin:
        tokens, start = 0, time.perf_counter()
        while (lasted := time.perf_counter() - start) < float(line):
            tokens += some()
        print(tokens / lasted, flush=True)


class Worker:
    """A process that does one kind of work."""

    def __init__(self, kind: str, *, group: Path | None = None, threads: int | None = None) -> None:
        """`group` is the folder of the process's control group."""
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.kind = kind
        command = [sys.executable, "-m", "benchmarks.sharing", "--work", kind]
        if group is not None:
            join = f"echo $$ > '{group / 'cgroup.procs'}' && exec \"$@\""
            command = ["sh", "-c", join, "sh", *command]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def start(self, seconds: float) -> None:
        """Let the process work for some seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def rate(self) -> float:
        """Wait for the end of the work; returns tokens per second."""
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process for {self.kind} ended; its messages are above")
        return line


def rates(workers: Sequence[Worker], seconds: float) -> list[float]:
    """Tokens per second of each of several workers that work at the same time."""
    for worker in workers:
        worker.start(seconds)
    return [worker.rate() for worker in workers]


@contextlib.contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Run programs that each keep a processor busy."""
    command = [sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@contextlib.contextmanager
def control_group() -> Iterator[Path | None]:
    """A control group with a quota of one processor; None if this process may not create one."""
    old = (CONTROL_GROUPS / "cpu" / "cpu.cfs_quota_us").exists()
    folder = CONTROL_GROUPS / ("cpu" if old else "") / f"nemotron3-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        if old:
            (folder / "cpu.cfs_period_us").write_text("100000")
            (folder / "cpu.cfs_quota_us").write_text("100000")
        else:
            (folder / "cpu.max").write_text("100000 100000")
        yield folder
    except OSError:  # version 2 without the cpu controller
        yield None
    finally:
        for _ in range(50):  # a process leaves its group shortly after its end
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


class Rows:
    """The lines of the table; each method measures one share once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._workers: dict[str, list[Worker]] = {}

    def workers(self, kinds: Sequence[str]) -> list[Worker]:
        """A process for each kind; those of earlier lines are reused."""
        chosen = []
        for place, kind in enumerate(kinds):
            nth = list(kinds[:place]).count(kind)
            kept = self._workers.setdefault(kind, [])
            if len(kept) == nth:
                kept.append(Worker(kind))
            chosen.append(kept[nth])
        return chosen

    def close(self) -> None:
        """End all processes."""
        for kept in self._workers.values():
            for worker in kept:
                worker.close()

    def beside_busy(self, kind: str, count: int) -> dict[str, float]:
        """The share of a program beside `count` programs that each keep a processor busy."""
        workers = self.workers([kind])
        (alone,) = rates(workers, self.seconds)
        with busy_programs(count):
            (beside,) = rates(workers, self.seconds)
        return {"share": beside / alone, f"{kind} alone": alone}

    def together(self, kinds: Sequence[str]) -> dict[str, float]:
        """The sum of the shares of programs that run at the same time."""
        workers = self.workers(kinds)
        alone = {kind: rates(self.workers([kind]), self.seconds)[0] for kind in set(kinds)}
        shares = [
            rate / alone[kind]
            for rate, kind in zip(rates(workers, self.seconds), kinds, strict=True)
        ]
        return {"share": sum(shares), "lowest": min(shares)} | {
            f"{kind} alone": rate for kind, rate in alone.items()
        }

    def with_quota(self, kind: str, group: Path) -> dict[str, float]:
        """The share of one thread's speed in a group with a quota of one processor."""
        one, held = Worker(kind, threads=1), Worker(kind, group=group)
        try:
            (alone,) = rates([one], self.seconds)
            (within,) = rates([held], self.seconds)
        finally:
            one.close()
            held.close()
        return {"share": within / alone, f"{kind} on one thread": alone}


def measure(
    only: Sequence[str], *, seconds: float, repeats: int, group: Path | None
) -> dict[str, list[dict[str, float]]]:
    """Measure every line `repeats` times, in turns."""
    rows, lines = Rows(seconds), dict[str, Callable[[], dict[str, float]]]()
    if "busy" in only:
        for kind, count in itertools.product(KINDS, BUSY):
            name = f"{kind} beside {count} busy"
            lines[name] = lambda kind=kind, count=count: rows.beside_busy(kind, count)
    if "together" in only:
        for name, kinds in GROUPS.items():
            lines[name] = lambda kinds=kinds: rows.together(kinds)
    if "quota" in only and group is not None:
        for kind in KINDS:
            lines[f"{kind}, {QUOTA}"] = lambda kind=kind: rows.with_quota(kind, group)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in lines}
    try:
        for order in turns(list(lines), rounds=repeats):
            for name in order:
                found[name].append(lines[name]())
                print(f"  {name}: {found[name][-1]['share']:.2f}", flush=True)
    finally:
        rows.close()
    return found


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of each figure, and the range of the shares."""
    lines = {}
    for name, taken in found.items():
        line = {key: statistics.median(each[key] for each in taken) for key in taken[0]}
        shares = [each["share"] for each in taken]
        lines[name] = line | {"share_min": min(shares), "share_max": max(shares)}
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", choices=KINDS, help=argparse.SUPPRESS)
    parts = ("busy", "together", "quota")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="only these lines")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args(arguments)
    if options.work:
        work_when_told(options.work)
        return
    before = machine.load_average()
    machine.warn_if_busy(before)
    with control_group() as group:
        if group is None and "quota" in options.only:
            print(f"{QUOTA} is left out: this process may not make a control group with one")
        found = measure(options.only, seconds=options.seconds, repeats=options.repeats, group=group)
    lines = table(found)
    for name, line in lines.items():
        spread = f"{line['share_min']:.2f} to {line['share_max']:.2f}"
        print(f"{name:45}{line['share']:6.2f}  ({spread})")
    result: dict[str, Any] = {
        "command": machine.command("benchmarks.sharing"),
        "date": date.today().isoformat(),
        "machine": machine.description()
        | {"load_before": before, "load_after": machine.load_average()},
        "seconds": options.seconds,
        "repeats": options.repeats,
        "lines": lines,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"sharing-{machine.processor_name()}-{result['date']}.json"
    if target.exists():  # parts that were measured one by one
        result["lines"] = json.loads(target.read_text())["lines"] | lines
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{target}")


if __name__ == "__main__":
    main()
