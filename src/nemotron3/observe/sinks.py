"""Sinks of metrics: a JSON line per step, and TensorBoard if it is installed.

A sink is opened with the next step of the run. Metrics of this step and later ones, which a killed
run has logged, are removed, since the resumed run logs them again. So an interrupted and resumed
run has exactly the metrics of an uninterrupted one.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron3.observe.json_lines import cut_lines
from nemotron3.observe.metrics import decode_line, encode_line


class JsonlSink:
    """`metrics.jsonl`: one line per step, written before the next step begins."""

    def __init__(self, path: Path, *, next_step: int) -> None:
        """Keep the lines before `next_step` and remove the others; 0 starts an empty file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_lines(path, lambda step: step >= next_step, decode=_step_of)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        self._file.write(encode_line(step, metrics))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Scalars for TensorBoard; a resumed run hides the later steps of the killed one."""

    def __init__(self, directory: Path, *, next_step: int) -> None:
        """Open an event file in `directory`."""
        try:
            tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise ImportError(
                "writing TensorBoard events needs the package tensorboard: "
                "pip install 'nemotron3[train]'"
            ) from error
        self._writer = tensorboard.SummaryWriter(str(directory), purge_step=next_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Write the last events and close the file."""
        self._writer.close()


def _step_of(line: bytes) -> int:
    try:
        return decode_line(line)[0]
    except (ValueError, TypeError) as error:
        raise ValueError(f"is not a step: {error}") from error
