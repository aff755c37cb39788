"""`/aggregate_metrics`: statistics of many verified rollouts, under NeMo Gym's names."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from nemotron3.environments.gym_protocol import FAILURE_CLASS, TASK_INDEX

_LARGE_EXPONENT = 512
"""Of numbers from which on squares and sums are computed of smaller ones, exactly scaled."""
_INDEX = "_ng_"  # keys of NeMo Gym itself, which are no measurements


def aggregate_metrics(verified: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, extremes, median and deviation of every number, over tasks and over all.

    Verifications that failed are left out, and counted.
    """
    judged = [each for each in verified if each.get(FAILURE_CLASS) is None]
    tasks: defaultdict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for each in judged:
        tasks[each.get(TASK_INDEX, 0)].append(each)
    overall = _statistics(judged)
    if len(judged) < len(verified):
        overall["num_failed"] = len(verified) - len(judged)
    return {
        "group_level_metrics": [
            {TASK_INDEX: task, "num_rollouts": len(each), **_statistics(each)}
            for task, each in sorted(tasks.items(), key=lambda item: str(item[0]).zfill(12))
        ],
        "agent_metrics": overall,
        "key_metrics": {k: v for k, v in overall.items() if k.startswith("mean/")},
    }


def _statistics(verified: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for each in verified:
        for name, value in _numbers(each).items():
            values[name].append(value)
    found: dict[str, Any] = {}
    for name, given in values.items():
        found |= {
            f"mean/{name}": _of_any_size(statistics.fmean, given),
            f"max/{name}": max(given),
            f"min/{name}": min(given),
            f"median/{name}": _of_any_size(statistics.median, given),
            f"std/{name}": _of_any_size(statistics.stdev, given) if len(given) > 1 else 0.0,
        }
    return found


def _of_any_size(statistic: Callable[[list[float]], float], given: list[float]) -> float | None:
    """A statistic whose sums may be larger than any float; None where it is so itself."""
    exponent = max(0, max(math.frexp(value)[1] for value in given) - _LARGE_EXPONENT)
    try:
        return math.ldexp(statistic([math.ldexp(value, -exponent) for value in given]), exponent)
    except OverflowError:
        return None


def _numbers(verified: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one verification, those of `reward_components` and of the usage included."""
    response = verified.get("response")
    usage = (
        cast(Mapping[str, Any], response).get("usage") if isinstance(response, Mapping) else None
    )
    found: dict[str, float] = {}
    for prefix, fields in (
        ("", verified),
        ("reward_components/", verified.get("reward_components")),
        ("", usage),
    ):
        if isinstance(fields, Mapping):
            for name, value in cast(Mapping[str, Any], fields).items():
                number = _number(value)
                if number is not None and not name.startswith(_INDEX):
                    found[f"{prefix}{name}"] = number
    return found


def _number(value: Any) -> float | None:
    """A finite number as a float; None for what is none, and for an integer beyond all floats."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
