"""Format measured seconds as text: shares of limits, rates, ratios, or a dash if missing."""

from benchmarks.gpu.clock import Timing
from benchmarks.gpu.record import Results

NONE = "-"


def milliseconds(timing: Timing | None) -> str:
    """The median in milliseconds."""
    seconds = _median(timing)
    return NONE if seconds is None else f"{seconds * 1e3:.3f}"


def floor_s(results: Results, *, flops: float, bytes_: float) -> float | None:
    """The least time that the measured limits allow."""
    rate, bandwidth = results.limit("product_flops_per_s"), results.limit("copy_bytes_per_s")
    if rate is None or bandwidth is None:
        return None
    return max(flops / rate, bytes_ / bandwidth)


def share(part: float | None, whole: float | None) -> str:
    """Part of a whole in percent."""
    return NONE if part is None or not whole else f"{part / whole:.0%}"


def ratio(results: Results, theirs: Timing | None, ours: Timing | None) -> str:
    """Our speed divided by theirs; a dash if any kernel disagrees with its reference."""
    if not results.may_compare:
        return NONE
    peer, own = _median(theirs), _median(ours)
    return NONE if peer is None or not own else f"{peer / own:.2f}x"


def _median(timing: Timing | None) -> float | None:
    return None if timing is None else timing.get("median_s")
