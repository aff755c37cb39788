"""The results, which are saved after every part, so that a crash or a time limit loses nothing.

    {"command": ..., "date": ..., "machine": {...}, "sections": {"parity": {"scan": {...}}}}

A part that failed has `error`, one that was not measured has `left_out` with the reason. Before a
part runs, an error is saved in its place, which remains if the process dies.
"""

import json
import os
from pathlib import Path
from typing import Any

Figure = dict[str, Any]

DIED = "the process ended while this was measured: a crash, or the time limit"


class Results:
    """Figures by section and part."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read the results from a file."""
        return cls(json.loads(path.read_text()))

    def figures(self, section: str) -> dict[str, Figure]:
        """All parts of a section, measured or not."""
        return self.content["sections"].get(section, {})

    def measured(self, section: str) -> dict[str, Figure]:
        """The parts that were measured."""
        return {
            name: figure
            for name, figure in self.figures(section).items()
            if "error" not in figure and "left_out" not in figure
        }

    def missing(self) -> list[str]:
        """A line for each part that failed or was left out."""
        return [
            f"{section}, {part}: {'FAILED: ' * ('error' in figure)}{reason}"
            for section, figures in self.content["sections"].items()
            for part, figure in figures.items()
            if (reason := figure.get("error") or figure.get("left_out"))
        ]

    def disagreements(self) -> list[str]:
        """Reasons against a comparison: parts of parity that disagree, failed or did not run."""
        parts = self.figures("parity")
        if not parts:
            return ["parity was not measured"]
        lines = []
        for name, figure in parts.items():
            reason = figure.get("error") or figure.get("left_out")
            reasons = [reason] if reason else figure["red"]
            lines += [f"{name}: {line}" for line in reasons]
        return lines

    @property
    def may_compare(self) -> bool:
        """Whether speeds may be compared: only if all kernels agree with their references."""
        return not self.disagreements()

    def limit(self, name: str) -> float | None:
        """A measured limit of the device, such as `product_flops_per_s`."""
        for figure in self.measured("limits").values():
            if figure.get(name) is not None:
                return figure[name]
        return None


class Record(Results):
    """Results that are saved after each change."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.path = path

    @classmethod
    def open(cls, path: Path) -> "Record":
        """Continue the results in a file."""
        return cls(path, json.loads(path.read_text()))

    def put(self, section: str, part: str, figure: Figure) -> None:
        """Add a figure, and save all results."""
        self.content["sections"].setdefault(section, {})[part] = figure
        self.write()

    def write(self) -> None:
        """Save all results atomically."""
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(draft, self.path)
