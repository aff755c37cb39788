"""The resources of the kernels that ran: registers, spills, shared memory.

Triton keeps every compiled variant in its kernel object. A kernel with spills, or with 255
registers per thread, may be faster with more warps or smaller tiles.
"""

import sys
from collections.abc import Iterator
from typing import Any


def kernel_modules() -> list[Any]:
    """The imported modules with kernels."""
    names = [n for n in sys.modules if n.startswith("nemotron3.ops.") and n.endswith("triton")]
    return [sys.modules[name] for name in sorted(names)]


def compiled_kernels() -> Iterator[tuple[str, Any]]:
    """Every loaded compiled variant with its kernel's name; the interpreter has none."""
    for module in kernel_modules():
        for value in vars(module).values():
            if getattr(value, "__module__", None) != module.__name__:
                continue
            for cache in getattr(value, "device_caches", {}).values():
                for compiled in cache[0].values():
                    yield f"{module.__name__.split('.')[2]}: {value.__name__}", compiled


class Launches:
    """Reports the variants that were compiled since its creation."""

    def __init__(self) -> None:
        self._known = {id(compiled) for _, compiled in compiled_kernels()}

    def fresh(self) -> list[dict[str, Any]]:
        """Each new variant, with its resources."""
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
