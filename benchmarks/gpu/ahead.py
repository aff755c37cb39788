"""Compiling on all processor cores before the device is asked for anything.

Triton compiles a kernel when it is first launched, one after another, while the device waits; for
everything that a run launches that is a minute or more of the ten. But it can compile for a device
without using it (benchmarks/gpu/compiling.py), and keeps what it compiled on disk. So as many
processes as there are cores go through the cases of a run once, and the run finds them compiled.
What is missed here is compiled there: nothing depends on this but time.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.gpu import cases, tuning
from benchmarks.gpu.clock import ToyClock
from benchmarks.gpu.compiling import compile_case, compiling
from benchmarks.gpu.failures import kernel_errors
from benchmarks.gpu.sections import decoding, parity
from benchmarks.gpu.setting import Setting

from nemotron3.models.config import ModelConfig

Job = Callable[[], None]


def compile_ahead(*, capability: int, is_tuning: bool, seconds: float) -> float:
    """Run all shares side by side; returns the seconds it took."""
    begin, count = time.monotonic(), max(1, (os.cpu_count() or 2) - 1)
    words = ["--capability", str(capability), *["--tune"] * is_tuning]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", "--ahead", f"{index}/{count}", *words],
            cwd=Path(__file__).parents[2],
        )
        for index in range(count)
    ]
    for process in processes:
        left = seconds - (time.monotonic() - begin)
        try:
            process.wait(timeout=max(left, 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
    return time.monotonic() - begin


def compile_share(index: int, count: int, *, capability: int, is_tuning: bool) -> None:
    """Every `count`th job; what fails here fails, and is named, where it is measured."""
    setting = Setting(device=torch.device("meta"), clock=ToyClock(), is_toy=False)
    jobs = tuning_jobs(setting) if is_tuning else jobs_of_a_run(setting)
    with compiling(capability):
        for job in jobs[index::count]:
            try:
                job()
            except kernel_errors():
                continue


def jobs_of_a_run(setting: Setting) -> list[Job]:
    """The cases of parity, of the layers, and of decoding."""
    models = [*setting.models().values(), ModelConfig.preset("small")]
    found = [c for some in parity.operations(models[0], setting).values() for c in some]
    for config in models:
        found += cases.layer_cases(config, setting.tokens, torch.bfloat16)
    found += decoding.all_cases(setting).values()
    return [lambda case=case: compile_case(case) for case in found]


def tuning_jobs(setting: Setting) -> list[Job]:
    """Every candidate of every knob, the others as they are."""

    def job(search: tuning.Search, knob: tuning.Knob, value: object) -> None:
        with tuning.set_to(knob, value):
            compile_case(search.case)

    return [
        lambda s=search, k=knob, v=value: job(s, k, v)
        for config in setting.models().values()
        for search in tuning.searches(config, setting.tokens)
        for knob in search.knobs
        for value in knob.candidates
    ]
