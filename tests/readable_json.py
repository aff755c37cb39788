"""JSON for committed files: one entry a line, and lists of numbers on a line each."""

import json
from typing import Any


def readable_json(value: Any) -> str:
    """The text, with a newline at its end."""
    lines: list[str] = []
    depth = 0
    for line in json.dumps(value, indent=1, ensure_ascii=False).splitlines():
        if depth:
            lines[-1] += line.strip() + (" " if line.endswith(",") else "")
        else:
            lines.append(line)
        depth += line.rstrip().endswith("[") - line.strip().startswith("]")
    return "\n".join(line.rstrip() for line in lines) + "\n"
