"""Run sections within a time limit, each in its own process.

After a fault of a kernel, such as an invalid address, its process cannot use the device again. So a
section runs in a child process; if that ends early, another one continues with the parts that are
not saved. If a section exceeds its time, its remaining parts are marked as left out. Time that a
section does not need goes to the later ones.
"""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.gpu.failures import kernel_errors
from benchmarks.gpu.record import DIED, Record
from benchmarks.gpu.section import Section
from benchmarks.gpu.setting import Setting

_GRACE_S = 15.0
"""Seconds for which a part may continue after its section's time is over."""
_FAULT = 3
"""Exit status of a child whose device no longer answers."""
_ROOT = Path(__file__).parents[2]
OUT_OF_TIME = "no time was left"


def run_sections(
    sections: Sequence[Section],
    record: Record,
    *,
    seconds: float,
    is_toy: bool,
    is_inference: bool = False,
) -> None:
    """Run all sections in order."""
    options = ["--toy"] * is_toy + ["--inference"] * is_inference
    end = time.monotonic() + seconds
    for index, section in enumerate(sections):
        reserved = sum(later.budget_s for later in sections[index + 1 :])
        left = end - time.monotonic()
        allowed = min(left, max(section.budget_s, left - reserved))
        print(f"\n== {section.title} (at most {max(allowed, 0):.0f} s)", flush=True)
        if allowed < 1:
            record.put(section.name, "all", {"left_out": OUT_OF_TIME})
            continue
        _run_in_children(section, record, allowed, options)


def _run_in_children(
    section: Section, record: Record, allowed: float, options: Sequence[str]
) -> None:
    until = time.monotonic() + allowed
    while True:
        known = len(record.figures(section.name))
        left = until - time.monotonic()
        words = ["--section", section.name, "--record", str(record.path), "--seconds", str(left)]
        command = [sys.executable, "-m", "benchmarks.gpu", *words, *options]
        try:
            status = subprocess.run(
                command, cwd=_ROOT, check=False, timeout=max(left, 0) + _GRACE_S,
                env=environment(is_toy="--toy" in options),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = None
        record.content = Record.open(record.path).content
        if status is None:  # killed within a part; the later parts are not in the record
            record.put(section.name, "parts behind it", {"left_out": OUT_OF_TIME})
        if not status:
            return
        if len(record.figures(section.name)) == known:  # no new part: another try would fail again
            record.put(section.name, "process", {"error": f"it ended with status {status}"})
            return


def environment(*, is_toy: bool) -> dict[str, str]:
    """Environment of a child process: Triton's interpreter is selected before its import."""
    variables = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    variables["PYTHONUNBUFFERED"] = "1"
    return variables | ({"TRITON_INTERPRET": "1"} if is_toy else {})


def run_section(section: Section, setting: Setting, record: Record, *, seconds: float) -> int:
    """Run the parts of a section that are not saved yet; returns an exit status."""
    end = time.monotonic() + seconds
    for name, part in section.parts(setting).items():
        if name in record.figures(section.name):
            continue
        if time.monotonic() > end:
            record.put(section.name, name, {"left_out": OUT_OF_TIME})
            continue
        record.put(section.name, name, {"error": DIED})
        begin = time.monotonic()
        try:
            figure = part()
        except kernel_errors() as error:
            figure = {"error": f"{type(error).__name__}: {error}"[:2000]}
        seconds_taken = round(time.monotonic() - begin, 2)
        record.put(section.name, name, figure | {"took_s": seconds_taken})
        print(f"  {name}: {_outcome(figure)} ({seconds_taken:.1f} s)", flush=True)
        if "error" in figure and not _answers(setting.device):
            return _FAULT
        gc.collect()  # free a model before the next is created
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def _outcome(figure: dict) -> str:
    if "error" in figure:
        return "FAILED: " + figure["error"]
    if "left_out" in figure:
        return "left out: " + figure["left_out"]
    return "RED: " + "; ".join(figure["red"]) if figure.get("red") else "done"


def _answers(device: torch.device) -> bool:
    """Whether a device still works after an error."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
