"""The numbers of a run: one flat dict per step, through one call.

A metric is a float whose name starts with an area: `train/loss`, `optim/grad_norm`,
`perf/tokens_per_s`. What follows may be what users call their files and environments, any printable
text: `reward/mean/reasoning_gym:chain_sum`, `eval/loss/my chats`. All metrics of a step are logged
together, so that the files of a resumed run can be cut at a step and every reader sees complete
steps.

JSON has no NaN and no infinity, which are the values that one most wants to find later, so they are
written as the strings "nan", "inf" and "-inf".

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

_AREA = re.compile(r"[a-z0-9_]+")


class MetricSink(Protocol):
    """A destination of metrics."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step; steps increase."""
        ...

    def close(self) -> None:
        """Write buffered metrics and release resources."""
        ...


class MetricLog:
    """Sends each step's metrics to every sink."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        """`close` closes the sinks."""
        self._sinks = list(sinks)
        self._last_step: int | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log all metrics of one step. Call it once per step, with increasing steps."""
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"metrics of step {step} came after step {self._last_step}; "
                "log each step once, with all its metrics"
            )
        floats = {name: float(value) for name, value in metrics.items()}
        for name in floats:
            if not is_metric_name(name):
                raise ValueError(f"metric name {name!r} must look like 'train/loss'")
        self._last_step = step
        for sink in self._sinks:
            sink.write(step, floats)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        """Return the log; the end of the `with` block closes the sinks."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close every sink."""
        self.close()


def is_metric_name(name: str) -> bool:
    """Whether a name is an area and parts of printable text, none of which is blank."""
    area, *parts = name.split("/")
    return bool(_AREA.fullmatch(area) and parts and all(map(is_name_part, parts)))


def is_name_part(text: str) -> bool:
    """Whether a text can be a part of a metric's name, between slashes."""
    return text.isprintable() and bool(text.strip()) and "/" not in text


class MetricWindow:
    """A sink that averages the last steps, for a steady console line.

    A metric that only some steps have (`eval/…`) is averaged over these. A value that is not finite
    makes the average not finite, so the line shows that something is wrong.
    """

    def __init__(self, num_steps: int) -> None:
        """Average over the last `num_steps` steps."""
        self._steps: deque[Mapping[str, float]] = deque(maxlen=num_steps)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a step, and remove the oldest."""
        del step
        self._steps.append(dict(metrics))

    def close(self) -> None:
        """Do nothing: the window has no resources."""

    def averages(self) -> dict[str, float]:
        """The mean of each metric in the window."""
        values: dict[str, list[float]] = {}
        for metrics in self._steps:
            for name, value in metrics.items():
                values.setdefault(name, []).append(value)
        return {name: sum(found) / len(found) for name, found in values.items()}


def encode_line(step: int, metrics: Mapping[str, float]) -> str:
    """One line of `metrics.jsonl`; `decode_line` restores floats bit for bit."""
    record = {name: v if math.isfinite(v) else str(v) for name, v in metrics.items()}
    return json.dumps({"step": step, **record}, allow_nan=False) + "\n"


def decode_line(line: str | bytes) -> tuple[int, dict[str, float]]:
    """The step and metrics of one line. Raises ValueError for an incomplete line."""
    record: Any = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"no step in {record!r}")
    step: int = record.pop("step")
    return step, {name: float(value) for name, value in record.items()}


def read_metrics(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The steps of a `metrics.jsonl`; an incomplete last line is skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield decode_line(line)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not a step ({error})") from error
