"""The limits of the device, and whether its clocks can be trusted.

The limits are the rate of a large bfloat16 product and the bandwidth of a large copy, which counts
bytes read and bytes written. Clocks are read while products run, since an idle device slows down.
They are not set, and the power limit keeps a device under load well below its highest clock. So a
run gets a warning if the clock is far below, or if the limits at its end differ from those at its
start. The event timer is compared with the host's over the same work.
"""

import shutil
import subprocess

import torch
from benchmarks.gpu.record import Figure, Results
from benchmarks.gpu.section import Part, Rows, Section
from benchmarks.gpu.setting import Draw, Setting

from nemotron3.runtime.devices import measure_product_rate

_QUERY = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw")
_SLOW, _MOVED = 0.5, 0.1
"""Share of the highest clock below which a run gets a warning, and the change of a limit within one
run from which it gets one."""


def parts(setting: Setting) -> dict[str, Part]:
    return {
        "product": lambda: product(setting),
        "copy": lambda: copy(setting),
        "clocks": lambda: clocks(setting),
    }


def product(setting: Setting) -> Figure:
    """The rate of a bfloat16 product; a multiply-add counts as two FLOPs."""
    if setting.is_toy:
        return {"product_flops_per_s": None}
    rate = measure_product_rate(setting.device, torch.bfloat16, seconds=1.0)
    return {"product_flops_per_s": rate}


def copy(setting: Setting) -> Figure:
    """The bandwidth of a copy from device memory to device memory."""
    megabytes = 1 if setting.is_toy else 2048
    source = Draw(setting.device, 0).normal(megabytes << 18)
    target = torch.empty_like(source)
    timing = setting.clock.kernel(lambda: target.copy_(source))
    moved = 2 * source.numel() * source.element_size()
    return {"copy_bytes_per_s": _rate(moved, timing["median_s"]), "timing": timing}


def clocks(setting: Setting) -> Figure:
    """The GPU's clock under load, and the ratio of events to the host's timer."""
    size = 32 if setting.is_toy else 8192
    a = Draw(setting.device, 0).normal(size, size, dtype=torch.bfloat16)

    def busy() -> None:
        for _ in range(200):
            torch.mm(a, a)

    agreement = setting.clock.agreement(busy)
    if setting.is_toy or not shutil.which("nvidia-smi"):
        return {"events_over_host": agreement}
    for _ in range(10):  # longer than nvidia-smi takes
        busy()
    words = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    torch.cuda.synchronize()
    values = answer.splitlines()[0].split(", ")
    return {"events_over_host": agreement} | dict(zip(_QUERY, values, strict=True))


def warnings(results: Results) -> list[str]:
    """Reasons to distrust the figures of a run."""
    lines = []
    for section in ("limits", "limits-again"):
        seen = results.measured(section).get("clocks", {})
        agreement = seen.get("events_over_host")
        if agreement is not None and not 0.95 < agreement < 1.05:
            lines.append(f"{section}: events and the host's clock differ, {agreement:.2f} to 1")
        if "clocks.sm" in seen:
            now, most = (float(seen[name]) for name in ("clocks.sm", "clocks.max.sm"))
            if now < _SLOW * most:
                lines.append(f"{section}: the processor ran at {now:.0f} of {most:.0f} MHz")
    for part, name in (("product", "product_flops_per_s"), ("copy", "copy_bytes_per_s")):
        first, last = (
            results.measured(section).get(part, {}).get(name)
            for section in ("limits", "limits-again")
        )
        if first and last and abs(last / first - 1) > _MOVED:
            lines.append(f"the rate of the {part} went from {first:.3g} to {last:.3g} per second")
    return lines


def rows_of(results: Results, section: str) -> Rows:
    figures = results.measured(section)
    rows = [["", "measured"]]
    if rate := figures.get("product", {}).get("product_flops_per_s"):
        rows.append(["bfloat16 product", f"{rate / 1e12:,.0f} TFLOP/s"])
    if rate := figures.get("copy", {}).get("copy_bytes_per_s"):
        rows.append(["copy, read and written", f"{rate / 1e12:.2f} TB/s"])
    clock = figures.get("clocks", {})
    if "clocks.sm" in clock:
        words = f"{clock['clocks.sm']} of {clock['clocks.max.sm']} MHz, {clock['power.draw']} W"
        rows.append(["clock under load", words])
    return rows if len(rows) > 1 else []


def _rate(amount: float, seconds: float | None) -> float | None:
    return None if seconds is None else amount / seconds


SECTION = Section(
    name="limits",
    title="Limits",
    order=0,
    budget_s=25,
    parts=parts,
    table=lambda results: rows_of(results, "limits"),
)
