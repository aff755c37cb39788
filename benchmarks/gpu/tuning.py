"""A small search over launch settings: warps, pipeline stages, tile sizes.

    make gpu-tune

A kernel's module has its settings as constants. The search sets each to its candidates in turn,
keeps the fastest and continues with the next, which is much shorter than a full grid. A candidate
counts only if its results equal those of the current settings. The search only reports: put the
best settings into the module, and run `make gpu-check`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import Any

import torch
from benchmarks.gpu import cases, steps
from benchmarks.gpu.cases import Case, Problem
from benchmarks.gpu.clock import Timing
from benchmarks.gpu.failures import kernel_errors
from benchmarks.gpu.figures import milliseconds
from benchmarks.gpu.record import Figure, Results
from benchmarks.gpu.section import Part, Rows, Section
from benchmarks.gpu.sections.kernels import forward, training
from benchmarks.gpu.sections.parity import difference, tolerance
from benchmarks.gpu.setting import Draw, Setting
from tests.ops.contract import outputs_and_gradients
from torch import Tensor

from nemotron3.models.config import ModelConfig

_SCAN, _CONV = "nemotron3.ops.ssd.triton", "nemotron3.ops.conv.triton"
_EXPERTS, _NORM = "nemotron3.ops.experts.triton", "nemotron3.ops.norm.triton"
_LOSS, _STEPS = "nemotron3.ops.cross_entropy.triton", "nemotron3.ops.ssd.decode_triton"
_ATTENTION = "nemotron3.ops.attention.decode_triton"


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One constant of a kernel's module, and its candidates."""

    module: str
    name: str
    candidates: Sequence[Any]

    @property
    def value(self) -> Any:
        """Its current value."""
        return getattr(import_module(self.module), self.name)


@dataclass(frozen=True, kw_only=True)
class Search:
    """One operation, forward or training, and the knobs that affect it."""

    case: Case
    is_training: bool
    knobs: Sequence[Knob]


def searches(config: ModelConfig, tokens: int) -> list[Search]:
    """All operations of a model's layers."""
    assert config.mamba is not None
    found = {c.operation: c for c in cases.layer_cases(config, tokens, torch.bfloat16)}
    rows = max(1, tokens // 128)  # 64 sequences
    few = {c.operation: c for c in steps.layer_steps(config, rows, 1, tokens, torch.bfloat16)}
    one = steps.layer_steps(config, 1, 1, tokens, torch.bfloat16)[-1]
    launches = _options(num_warps=(4, 8), num_stages=(1, 2, 3))
    walks = _options(num_warps=(2, 4, 8), num_stages=(1, 2, 3, 4))
    backward = _options(num_warps=(4, 8, 16), num_stages=(1, 2, 3))
    tiles = _options(BLOCK_TOKENS=(8, 16, 32), BLOCK_CHANNELS=(64, 128), num_warps=(4, 8))
    blocks = [(128, 256, 64, 8), (128, 128, 64, 8), (128, 128, 64, 4), (128, 128, 32, 8)]
    blocks += [(64, 256, 64, 8), (64, 256, 64, 4), (64, 128, 64, 4), (256, 128, 64, 8)]
    low = [
        _blocks(16, c, i, w, n)
        for c in (32, 64, 128)
        for i in (64, 128)
        for w in (2, 4)
        for n in (3, 4)
    ]
    ranges = _options(
        BLOCK_ROWS=(16, 64), BLOCK_KEYS=(32, 64, 128), num_warps=(2, 4), num_stages=(2, 3)
    )
    experts = [_blocks(*sizes, stages) for sizes in blocks for stages in (3, 4)]

    def search(operation: str, is_training: bool, *knobs: tuple[str, str, Any]) -> Search:  # noqa: FBT001
        known = [Knob(module=m, name=n, candidates=c) for m, n, c in knobs]
        return Search(case=found[operation], is_training=is_training, knobs=known)

    return [
        search("scan", True, (_SCAN, "_BACKWARD_TILE", (32, 64, 128)),
               (_SCAN, "_SCAN_BACKWARD", backward)),
        search("scan", False, (_SCAN, "_FORWARD_TILE", (64, 128)), (_SCAN, "_SCAN", launches),
               (_SCAN, "_STATES", walks)),
        search("experts", False, (_EXPERTS, "_PRODUCT", experts)),
        search("experts", True, (_EXPERTS, "_WEIGHT_GRADIENT", experts)),
        search("convolution", False, (_CONV, "_FORWARD", tiles)),
        search("convolution", True, (_CONV, "_BACKWARD", tiles)),
        search("gated norm", True, (_NORM, "_TILE", (1024, 2048, 4096)),
               (_NORM, "_COLUMNS_PER_WARP", (128, 256, 512))),
        search("norm", True, (_NORM, "_TILE", (1024, 2048, 4096)),
               (_NORM, "_COLUMNS_PER_WARP", (128, 256, 512))),
        search("cross-entropy", True, (_LOSS, "_BLOCK", (2048, 4096, 8192)),
               (_LOSS, "_ENTRIES_PER_WARP", (256, 512))),
        Search(case=few["scan steps"], is_training=False, knobs=[
            Knob(module=_STEPS, name="_STEPS",
                 candidates=_options(BLOCK_P=(8, 16, 32, 64), num_warps=(1, 2, 4, 8)))]),
        Search(case=few["attention steps"], is_training=False, knobs=[
            Knob(module=_ATTENTION, name="_RANGES", candidates=ranges),
            Knob(module=_ATTENTION, name="_RANGE_KEYS", candidates=(256, 512, 1024))]),
        Search(case=one, is_training=False, knobs=[
            Knob(module=_EXPERTS, name="_FEW_ROWS", candidates=low)]),
    ]  # fmt: skip


def _options(**choices: Sequence[int]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def _blocks(*sizes: int) -> Any:
    return import_module(_EXPERTS)._Blocks(*sizes)


@contextmanager
def set_to(knob: Knob, value: Any) -> Iterator[None]:
    """Set a constant to another value inside the `with` block."""
    module, before = import_module(knob.module), knob.value
    setattr(module, knob.name, value)
    try:
        yield
    finally:
        setattr(module, knob.name, before)


def parts(setting: Setting) -> dict[str, Part]:
    return {
        f"{search.case.operation}{', training' * search.is_training}, {name}, {search.case.size}": (
            lambda search=search: tune(search, setting)
        )
        for name, config in setting.models().items()
        for search in searches(config, setting.tokens)
    }


def tune(search: Search, setting: Setting) -> Figure:
    """Search each knob in turn, keeping the best value of one for the next."""
    problem = search.case.draw(Draw(setting.device, 1))
    expected = _results(search, problem)
    make = training if search.is_training else forward
    action = make(problem, problem.call("triton"))
    default = setting.clock.kernel(action)
    best, tried = default, []

    def walk(knobs: Sequence[Knob]) -> dict[str, Any]:
        nonlocal best
        if not knobs:
            return {}
        knob, *rest = knobs
        chosen = knob.value
        for value in _some(knob.candidates, setting):
            if value == knob.value:
                continue
            with set_to(knob, value):
                outcome = _measure(search, problem, expected, action, setting)
            tried.append({"knob": knob.name, "value": _plain(value), **outcome})
            if _is_faster(outcome, best):
                best, chosen = outcome, value
        with set_to(knob, chosen):
            return {knob.name: _plain(chosen)} | walk(rest)

    return {
        "size": search.case.size,
        "default": default,
        "settings": walk(search.knobs),
        "best": best,
        "tried": tried,
    }


def _measure(
    search: Search,
    problem: Problem,
    expected: Sequence[Tensor],
    action: Callable[[], object],
    setting: Setting,
) -> Timing:
    try:
        differs = max(
            difference(a, e) for a, e in zip(_results(search, problem), expected, strict=True)
        )
        if not differs <= tolerance(torch.bfloat16, setting):
            return {"error": f"differs by {differs:.1e}"}
        return setting.clock.kernel(action, seconds=0.15)
    except kernel_errors() as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _results(search: Search, problem: Problem) -> list[Tensor]:
    call = problem.call("triton")
    if search.is_training:
        return outputs_and_gradients(call, problem.operands)
    with torch.no_grad():
        return [t for t in call(*problem.operands) if t.is_floating_point()]


def _some(candidates: Sequence[Any], setting: Setting) -> Sequence[Any]:
    return candidates[:2] if setting.is_toy else candidates


def _is_faster(a: Timing, b: Timing) -> bool:
    first, second = a.get("median_s"), b.get("median_s")
    return first is not None and second is not None and first < second


def _plain(value: Any) -> Any:
    """A value in the types of JSON."""
    return value._asdict() if hasattr(value, "_asdict") else value


def table(results: Results) -> Rows:
    rows = [["", "as it is, ms", "best, ms", "candidates", "settings"]]
    for name, figure in results.measured("tuning").items():
        tried = figure["tried"]
        failed = sum("error" in outcome for outcome in tried)
        rows.append(
            [
                name,
                milliseconds(figure["default"]),
                milliseconds(figure["best"]),
                f"{len(tried)}, {failed} failed",
                ", ".join(f"{knob} = {value}" for knob, value in figure["settings"].items()),
            ]
        )
    return rows if len(rows) > 1 else []


TUNING = Section(
    name="tuning", title="Launch settings", order=0, budget_s=480, parts=parts, table=table
)
