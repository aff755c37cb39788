"""Compile kernels on all processor cores before the GPU is used.

Triton compiles a kernel at its first launch, one after another, while the GPU waits; for all
kernels of a run that is a minute or more of the ten. But it can compile for a GPU without using it
(benchmarks/gpu/compiling.py), and caches the result on disk. So one process per core goes through
the cases of a run, and the run finds the kernels compiled. A kernel that is missed here is compiled
in the run, which only takes longer.
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
    """Run all shares in parallel; returns the seconds that it took."""
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
    """Run every `count`th job; a failure is ignored here, because the measurement reports it."""
    setting = Setting(device=torch.device("meta"), clock=ToyClock(), is_toy=False)
    jobs = tuning_jobs(setting) if is_tuning else jobs_of_a_run(setting)
    with compiling(capability):
        for job in jobs[index::count]:
            try:
                job()
            except kernel_errors():
                continue


def jobs_of_a_run(setting: Setting) -> list[Job]:
    """The cases of the sections on parity, layers and decoding."""
    models = [*setting.models().values(), ModelConfig.preset("small")]
    found = [c for some in parity.operations(models[0], setting).values() for c in some]
    for config in models:
        found += cases.layer_cases(config, setting.tokens, torch.bfloat16)
    found += decoding.all_cases(setting).values()
    return [lambda case=case: compile_case(case) for case in found]


def tuning_jobs(setting: Setting) -> list[Job]:
    """Every candidate of every knob, with the current values of the others."""

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
