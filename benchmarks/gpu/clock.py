"""Seconds of work on a GPU, measured by CUDA events.

A kernel is timed alone: the cache is flushed between runs, and so many flushes are queued that the
device is still busy when the kernel has been launched, so that the host's launch time does not
count. The host's time is recorded as well; if it exceeds the kernel's, the launch is the limit. A
step is timed with its launches, because a user waits for both.

    sample = clock.kernel(lambda: rms_norm(x, w, 1e-5))
    sample["median_s"], sample["host_s"]
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.timing import Sample, interleave, timed
from torch import Tensor

Action = Callable[[], object]
Timing = dict[str, Any]

_SWEPT_BYTES = 256 << 20
"""Bytes that flush the cache: several times the L2 cache of any GPU (50 MB on an H100)."""


class Clock:
    """Times work on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._swept: Tensor | None = None

    def kernel(self, action: Action, *, seconds: float = 0.25) -> Timing:
        """Time launches of one operation, for about `seconds` in total."""
        for _ in range(3):
            action()
        torch.cuda.synchronize(self.device)
        estimate, host = self._one(action), self._host_s(action)
        sweep = self._one(self._sweep)
        sweeps = 1 + int(1.5 * host / sweep)
        repeats = max(5, min(50, int(seconds / (estimate + sweeps * sweep))))
        pairs = []
        for _ in range(repeats):
            for _ in range(sweeps):
                self._sweep()
            pairs.append(self._around(action))
        torch.cuda.synchronize(self.device)
        times = [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return as_timing(Sample(tuple(times))) | {"host_s": host}

    def steps(self, actions: dict[str, Action], *, repeats: int = 5) -> dict[str, Timing]:
        """Time whole steps by the host's clock, contestants in turns, after one warm-up step."""
        contestants = {name: timed(self._finished(action)) for name, action in actions.items()}
        samples = interleave(contestants, repeats=repeats, warmups=2)
        return {name: as_timing(sample) for name, sample in samples.items()}

    def step(self, action: Action, *, repeats: int = 5) -> Timing:
        """Time one kind of step."""
        return self.steps({"": action}, repeats=repeats)[""]

    def agreement(self, action: Action) -> float:
        """Ratio of the time by events to the time by the host's clock, for a long action."""
        action()
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        start, end = self._around(action)
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3 / (time.perf_counter() - begin)

    def peak_bytes(self, action: Action) -> int | None:
        """Peak device memory of a step, including the memory allocated before it."""
        torch.cuda.reset_peak_memory_stats(self.device)
        action()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def _finished(self, action: Action) -> Action:
        def run() -> None:
            action()
            torch.cuda.synchronize(self.device)

        return run

    def _around(self, action: Action) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        return start, end

    def _one(self, action: Action) -> float:
        start, end = self._around(action)
        torch.cuda.synchronize(self.device)
        return max(start.elapsed_time(end) / 1e3, 1e-6)

    def _host_s(self, action: Action) -> float:
        """Seconds that the host takes for a launch, the shortest of a few."""
        shortest = float("inf")
        for _ in range(3):
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            action()
            shortest = min(shortest, time.perf_counter() - begin)
        torch.cuda.synchronize(self.device)
        return shortest

    def _sweep(self) -> None:
        if self._swept is None:
            self._swept = torch.empty(_SWEPT_BYTES, dtype=torch.int8, device=self.device)
        self._swept.zero_()


class ToyClock:
    """Runs everything once without timing: the time of the interpreter is meaningless."""

    def kernel(self, action: Action, *, seconds: float = 0.0) -> Timing:  # noqa: ARG002
        """Run once."""
        action()
        return {"median_s": None, "min_s": None, "max_s": None, "repeats": 1, "host_s": None}

    def steps(self, actions: dict[str, Action], *, repeats: int = 1) -> dict[str, Timing]:  # noqa: ARG002
        """Run each once."""
        return {name: self.kernel(action) for name, action in actions.items()}

    def step(self, action: Action, *, repeats: int = 1) -> Timing:  # noqa: ARG002
        """Run once."""
        return self.kernel(action)

    def agreement(self, action: Action) -> None:
        """Run once."""
        action()

    def peak_bytes(self, action: Action) -> None:
        """Run once."""
        action()


def as_timing(sample: Sample) -> Timing:
    """A sample as it is stored."""
    return {
        "median_s": sample.median,
        "min_s": min(sample.seconds),
        "max_s": max(sample.seconds),
        "repeats": len(sample.seconds),
    }
