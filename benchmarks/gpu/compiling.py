"""Compile every kernel at full size without a GPU, and report its resources.

    python -m benchmarks.gpu --compile

Triton can compile for a device that is absent, so a kernel that needs more shared memory than the
device has, or that spills registers, is found before a GPU is used. The real operations run on meta
tensors; every launch is replaced by a compilation.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import cases, steps
from benchmarks.gpu.cases import Case
from benchmarks.gpu.sections.kernels import forward, training
from benchmarks.gpu.setting import Draw

from nemotron3.models.config import ModelConfig
from nemotron3.ops import backends

SHARED_BYTES = 232_448
"""Most shared memory of one program on a multiprocessor of compute capability 9.0."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One variant of a kernel."""

    kernel: str
    registers: int
    stack_bytes: int
    """Spilled bytes per thread."""
    shared_bytes: int
    num_warps: int
    num_stages: int
    uses_warpgroups: bool
    """Whether its products use warp-group instructions, the fast ones of compute capability 9.0."""


class _Absent:
    """A driver for an absent device, with the methods that Triton calls before a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - with Triton

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[tuple[str, Any]]]:
    """In the `with` block launches only compile; the list gets each kernel's name and result."""
    from triton.runtime.driver import driver  # noqa: PLC0415 - with Triton
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    found: list[tuple[str, Any]] = []
    seen: set[int] = set()
    launch, require = JITFunction.run, backends._require_triton

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            found.append((f"{self.module.split('.')[2]}: {self.__name__}", kernel))
        return kernel

    driver.set_active(_Absent(capability))  # type: ignore[arg-type]
    JITFunction.run = compile_only
    backends._require_triton = lambda *_: None
    try:
        yield found
    finally:
        JITFunction.run, backends._require_triton = launch, require
        driver._active = None


def describe(name: str, kernel: Any) -> Compiled:
    """Read the resources from the compiled code."""
    import triton  # noqa: PLC0415 - with Triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", answer)
    assert usage, answer
    return Compiled(
        kernel=name,
        registers=int(usage[1]),
        stack_bytes=int(usage[2]),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        uses_warpgroups="wgmma" in kernel.asm["ptx"],
    )


def compile_layers(config: ModelConfig, tokens: int = 8192) -> list[tuple[str, Compiled]]:
    """Every kernel of a model's layers, forward and backward, and of its decoding steps."""
    rows: list[tuple[str, Compiled]] = []
    half = torch.bfloat16
    few = [case for n in (1, 4) for case in steps.layer_steps(config, 2, n, 1 << 17, half)]
    with compiling() as found:
        for case in [*cases.layer_cases(config, tokens, half), *few]:
            compile_case(case)
            rows += [(case.operation, describe(*each)) for each in found[len(rows) :]]
    return rows


def compile_case(case: Case) -> None:
    """Launch the forward and backward pass of a case on meta tensors."""
    problem = case.draw(Draw(torch.device("meta"), 0))
    ways: list[Callable[..., Callable[[], object]]] = [forward]
    ways += [training] * case.has_gradient
    for way in ways:
        way(problem, problem.call("triton"))()


def table(rows: list[tuple[str, Compiled]]) -> list[list[str]]:
    """Table rows for a terminal."""
    head = ["kernel", "registers", "stack, bytes", "shared, KB", "warps", "stages", "warp groups"]
    return [head] + [
        [
            c.kernel,
            str(c.registers),
            str(c.stack_bytes),
            f"{c.shared_bytes / 1024:.0f}",
            str(c.num_warps),
            str(c.num_stages),
            "yes" if c.uses_warpgroups else "no",
        ]
        for _, c in rows
    ]
