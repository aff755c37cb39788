"""The numbers of a run: one flat dict per step, through one call.

A metric is a float under a name with an area in front: `train/loss`, `optim/grad_norm`,
`perf/tokens_per_s`. Everything that a step has to say is logged together, so that the files of a
resumed run can be cut at a step and every reader sees whole steps.

JSON knows no NaN and no infinity, and these are the values one most wants to find later, so they
are the strings "nan", "inf" and "-inf" there.

    log = MetricLog([JsonlSink(run_dir / "metrics.jsonl", next_step=0), window := MetricWindow(20)])
    log.log(1, {"train/loss": 9.2, "optim/lr": 1e-5})
    window.averages()["train/loss"]
"""

import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

_NAME = re.compile(r"[a-z0-9_]+(/[A-Za-z0-9_.\-]+)+")


class MetricSink(Protocol):
    """Where metrics go."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step; steps rise."""
        ...

    def close(self) -> None:
        """Write out what is held back."""
        ...


class MetricLog:
    """Sends each step's metrics to every sink."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        """The sinks are closed with the log."""
        self._sinks = list(sinks)
        self._last_step: int | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log everything that one step has to say; called once per step, with rising steps."""
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"metrics of step {step} came after step {self._last_step}; "
                "log each step once, with all its metrics"
            )
        floats = {name: float(value) for name, value in metrics.items()}
        for name in floats:
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"metric name {name!r} must look like 'train/loss'")
        self._last_step = step
        for sink in self._sinks:
            sink.write(step, floats)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        """Log within a block that closes the sinks."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close every sink."""
        self.close()


class MetricWindow:
    """A sink that averages the last steps, for a console line that does not jump.

    A metric that is logged now and then (`eval/…`) is averaged over the steps that have it. A value
    that is not finite makes the average not finite: the line shows that something is wrong.
    """

    def __init__(self, num_steps: int) -> None:
        """Average over the last `num_steps` steps."""
        self._steps: deque[Mapping[str, float]] = deque(maxlen=num_steps)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a step in, and let the oldest go."""
        del step
        self._steps.append(dict(metrics))

    def close(self) -> None:
        """Nothing is held back."""

    def averages(self) -> dict[str, float]:
        """The mean of each metric in the window."""
        values: dict[str, list[float]] = {}
        for metrics in self._steps:
            for name, value in metrics.items():
                values.setdefault(name, []).append(value)
        return {name: sum(found) / len(found) for name, found in values.items()}


def encode_line(step: int, metrics: Mapping[str, float]) -> str:
    """One line of `metrics.jsonl`; floats come back bit for bit."""
    record = {name: v if math.isfinite(v) else str(v) for name, v in metrics.items()}
    return json.dumps({"step": step, **record}, allow_nan=False) + "\n"


def decode_line(line: str | bytes) -> tuple[int, dict[str, float]]:
    """The step and metrics of one line; `ValueError` for a line that is not whole."""
    record: Any = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"no step in {record!r}")
    step: int = record.pop("step")
    return step, {name: float(value) for name, value in record.items()}


def read_metrics(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The steps of a `metrics.jsonl`; a half-written last line is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield decode_line(line)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not a step ({error})") from error
