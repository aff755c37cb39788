"""Each kernel's time, compared with the device's lower bound and with plain PyTorch.

The lower bound is the larger of bytes divided by bandwidth and FLOPs divided by the product rate,
both measured in the same run. `forward` is a pass without gradients, `training` one with its
backward pass. PyTorch's time is that of the `torch` backend, which machines without the kernels
use.
"""

from collections.abc import Callable

import torch
from benchmarks.gpu import cases
from benchmarks.gpu.cases import Call, Case, Problem
from benchmarks.gpu.clock import Timing
from benchmarks.gpu.figures import floor_s, milliseconds, ratio, share
from benchmarks.gpu.launches import Launches
from benchmarks.gpu.record import Figure, Results
from benchmarks.gpu.section import Part, Rows, Section
from benchmarks.gpu.setting import Draw, Setting
from torch import Tensor


def parts(setting: Setting) -> dict[str, Part]:
    return {
        f"{case.operation}, {name}": lambda case=case: measure(case, setting)
        for name, config in setting.models().items()
        for case in cases.layer_cases(config, setting.tokens, torch.bfloat16)
    }


def measure(case: Case, setting: Setting) -> Figure:
    """Time forward and training with both backends."""
    problem, launches = case.draw(Draw(setting.device, 1)), Launches()
    figure: Figure = {"size": case.size}
    with torch.no_grad():
        outputs = problem.call("triton")(*problem.operands)
    figure["forward"] = {
        "flops": case.flops,
        "bytes": cases.forward_bytes(case, problem, outputs),
        **_by_backend(lambda call: forward(problem, call), problem, setting),
    }
    if case.has_gradient:
        figure["training"] = {
            "flops": 3 * case.flops,
            "bytes": cases.training_bytes(problem, outputs),
            **_by_backend(lambda call: training(problem, call), problem, setting),
        }
    return figure | {"launches": launches.fresh()}


def _by_backend(
    action: Callable[[Call], Callable[[], object]], problem: Problem, setting: Setting
) -> dict[str, Timing]:
    backends = {"triton": problem.call("triton"), "torch": problem.call("torch")}
    return {name: setting.clock.kernel(action(call)) for name, call in backends.items()}


def forward(problem: Problem, call: Call) -> Callable[[], object]:
    """A pass without gradients."""

    @torch.no_grad()
    def run() -> None:
        call(*problem.operands)

    return run


def training(problem: Problem, call: Call) -> Callable[[], object]:
    """A pass and its backward pass, for a fixed gradient of each result."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in problem.operands]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients: list[Tensor] = []

    def run() -> None:
        results = [t for t in call(*leaves) if t.requires_grad]
        if not gradients:
            gradients.extend(torch.randn_like(t) for t in results)
        torch.autograd.grad(results, wanted, gradients)

    return run


def table(results: Results) -> Rows:
    head = ["", "forward, ms", "of the limit", "training, ms", "of the limit", "against PyTorch"]
    rows = [head]
    for name, figure in results.measured("kernels").items():
        row = [name]
        for way in ("forward", "training"):
            seen = figure[way]
            floor = floor_s(results, flops=seen["flops"], bytes_=seen["bytes"])
            row += [milliseconds(seen["triton"]), share(floor, seen["triton"]["median_s"])]
        both = figure["training"]
        rows.append([*row, ratio(results, both["torch"], both["triton"])])
    return rows if len(rows) > 1 else []


SECTION = Section(
    name="kernels",
    title="Kernels, one layer each, bfloat16",
    order=20,
    budget_s=90,
    parts=parts,
    table=table,
)
