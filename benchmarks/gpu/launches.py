"""What the compiler made of the kernels that ran: registers, spills, shared memory.

Triton keeps every compiled variant in its kernel. Spills are registers that did not fit and went
through memory; at 255 registers a thread, more warps or smaller tiles are worth a try.
"""

import sys
from collections.abc import Iterator
from typing import Any


def kernel_modules() -> list[Any]:
    """The kernel files that something has imported."""
    names = [n for n in sys.modules if n.startswith("nemotron3.ops.") and n.endswith("triton")]
    return [sys.modules[name] for name in sorted(names)]


def compiled_kernels() -> Iterator[tuple[str, Any]]:
    """Every compiled variant that is loaded, with its kernel's name; the interpreter has none."""
    for module in kernel_modules():
        for value in vars(module).values():
            if getattr(value, "__module__", None) != module.__name__:
                continue
            for cache in getattr(value, "device_caches", {}).values():
                for compiled in cache[0].values():
                    yield f"{module.__name__.split('.')[2]}: {value.__name__}", compiled


class Launches:
    """Tells what was compiled since it was made."""

    def __init__(self) -> None:
        self._known = {id(compiled) for _, compiled in compiled_kernels()}

    def fresh(self) -> list[dict[str, Any]]:
        """Each variant that has run since, with what it takes."""
        return [
            {
                "kernel": name,
                "registers": compiled.n_regs,
                "spills": compiled.n_spills,
                "shared_bytes": compiled.metadata.shared,
                "num_warps": compiled.metadata.num_warps,
                "num_stages": compiled.metadata.num_stages,
            }
            for name, compiled in compiled_kernels()
            if id(compiled) not in self._known and compiled.module is not None
        ]
