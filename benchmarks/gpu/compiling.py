"""What the compiler makes of every kernel at full size, without a GPU.

    python -m benchmarks.gpu --compile

Triton compiles for a device that is not there as well as for one that is, so a kernel that wants
more shared memory than the device has, or that spills, shows before a GPU is spent on it. The real
operations run on tensors without numbers; every launch is turned into a compilation.
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
"""What one program may take of a multiprocessor of compute capability 9.0."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One variant of a kernel."""

    kernel: str
    registers: int
    stack_bytes: int
    """Per thread: registers that did not fit."""
    shared_bytes: int
    num_warps: int
    num_stages: int
    uses_warpgroups: bool
    """Whether its products are those of whole warp groups, the fast ones of compute 9.0."""


class _Absent:
    """What Triton asks of a driver before it launches."""

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
    """Within, launches compile and do not run; names and what was made of them are in the list."""
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
    """Read off the compiled code."""
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
    """Launch a case both ways on operands without numbers."""
    problem = case.draw(Draw(torch.device("meta"), 0))
    ways: list[Callable[..., Callable[[], object]]] = [forward]
    ways += [training] * case.has_gradient
    for way in ways:
        way(problem, problem.call("triton"))()


def table(rows: list[tuple[str, Compiled]]) -> list[list[str]]:
    """For a terminal."""
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
