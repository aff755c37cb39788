"""The device of a run: its choice, description, speed and memory."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from nemotron3.errors import BackendUnavailableError, ConfigError

DeviceName = Literal["auto", "cpu", "cuda"]

GPU = torch.device("cuda")
"""A GPU to compute plans for; the machine need not have one."""
FUSED_OPTIMIZER_DEVICES = frozenset({"cpu", "cuda"})
"""Devices on which PyTorch's fused optimizers run."""


def resolve_device(name: str) -> torch.device:
    """The device of a `DeviceName`; `auto` is a GPU if there is one, else the CPU."""
    if name not in get_args(DeviceName):
        raise ConfigError(
            f"is {name!r}; it must be one of {', '.join(get_args(DeviceName))}", field="device"
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = "has no CUDA" if torch.version.cuda is None else "finds no working driver or GPU"
        raise BackendUnavailableError(
            f"device {name!r} was asked for, but this PyTorch ({torch.__version__}) {build}; "
            "use --device cpu, or install a CUDA build of PyTorch on a machine with a GPU"
        )
    return torch.device("cuda")


def describe_device(device: torch.device) -> str:
    """A description for the record of a run: a GPU's name, or the processor and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_model() or 'CPU'}, {threads} {'thread' if threads == 1 else 'threads'}"


def processor_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name, or "" if the system does not report it."""
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all operations."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_product_rate(
    device: torch.device,
    dtype: torch.dtype,
    *,
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm,
    size: int = 1024,
    seconds: float = 0.3,
) -> float:
    """FLOP/s of a square matrix product: the peak with which the rate of a run is compared.

    `product` is the function that the run uses for products; if it is faster than PyTorch's, a
    comparison with PyTorch's rate could exceed 1.

    The rate is measured because the data sheet does not tell what a machine provides (cores,
    clocks, other load). It is that of the fastest of several short trials. Operands are random: on
    zeros or equal numbers a chip uses less power and runs faster than on weights.
    """
    size = size if device.type == "cpu" else 8 * size
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            product(a, a)
        synchronize(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    return best


def has_memory_of_its_own(device: torch.device) -> bool:
    """Whether a device has memory that other programs of the machine do not share, as a GPU has."""
    return device.type == "cuda"


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    # Other systems report the total only; half of it is assumed to be free.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
