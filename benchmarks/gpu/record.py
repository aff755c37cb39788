"""What was measured, on disk after every part, so that a crash or a time limit loses nothing.

    {"command": ..., "date": ..., "machine": {...}, "sections": {"parity": {"scan": {...}}}}

A part that failed holds `error`, one that was not measured `left_out` with the reason. Before a
part runs, its place holds an error already: that is what stays if the process dies in it.
"""

import json
import os
from pathlib import Path
from typing import Any

Figure = dict[str, Any]

DIED = "the process ended while this was measured: a crash, or the time limit"


class Results:
    """Figures by section and part, as they were read or as they grow."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    @classmethod
    def read(cls, path: Path) -> "Results":
        """From a file."""
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
        """Why no kernel may be compared: parts of parity that are red, failed or never ran."""
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
        """Whether speeds may be set against each other: only what computes the same has a ratio."""
        return not self.disagreements()

    def limit(self, name: str) -> float | None:
        """A measured limit of the device, such as `product_flops_per_s`."""
        for figure in self.measured("limits").values():
            if figure.get(name) is not None:
                return figure[name]
        return None


class Record(Results):
    """Results that are written as they come."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.path = path

    @classmethod
    def open(cls, path: Path) -> "Record":
        """Go on with a file."""
        return cls(path, json.loads(path.read_text()))

    def put(self, section: str, part: str, figure: Figure) -> None:
        """Take a figure in, and write all."""
        self.content["sections"].setdefault(section, {})[part] = figure
        self.write()

    def write(self) -> None:
        """Write all, whole or not at all."""
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(draft, self.path)
