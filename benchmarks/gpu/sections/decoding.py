"""Operations of decoding steps, one layer each.

A step has one token per sequence, or four as in the verification of drafts, where the state after
each token is kept. Batches of growing size have 8,192 cached tokens. The time goes into moving
states, keys and the chosen experts' weights, so the share is that of the copy bandwidth.
"""

import torch
from benchmarks.gpu import cases, steps
from benchmarks.gpu.cases import Case
from benchmarks.gpu.figures import milliseconds, ratio, share
from benchmarks.gpu.launches import Launches
from benchmarks.gpu.record import Figure, Results
from benchmarks.gpu.section import Part, Rows, Section
from benchmarks.gpu.sections.kernels import forward
from benchmarks.gpu.setting import Draw, Setting

_BATCHES = ((1, 1), (8, 1), (64, 1), (256, 1), (8, 4), (64, 4))
"""Numbers of sequences, and of tokens in each."""


def parts(setting: Setting) -> dict[str, Part]:
    return {
        name: lambda case=case: measure(case, setting) for name, case in all_cases(setting).items()
    }


def all_cases(setting: Setting) -> dict[str, Case]:
    """All cases by a name of operation, model, batch and tokens."""
    batches = ((1, 1), (2, 4)) if setting.is_toy else _BATCHES
    return {
        f"{case.operation}, {name}, batch {rows}, {length} token{'s' * (length > 1)}": case
        for name, config in setting.models().items()
        for rows, length in batches
        for case in steps.layer_steps(config, rows, length, setting.tokens, torch.bfloat16)
    }


def measure(case: Case, setting: Setting) -> Figure:
    """One layer's step."""
    problem, launches = case.draw(Draw(setting.device, 1)), Launches()
    kernel, plain = (problem.call(backend) for backend in ("triton", "torch"))
    with torch.no_grad():
        outputs = kernel(*problem.operands)
    return {
        "size": case.size,
        "bytes": cases.forward_bytes(case, problem, outputs),
        "triton": setting.clock.kernel(forward(problem, kernel)),
        "torch": setting.clock.kernel(forward(problem, plain)),
        "launches": launches.fresh(),
    }


def table(results: Results) -> Rows:
    rows = [["", "ms", "of the copy bandwidth", "against PyTorch"]]
    bandwidth = results.limit("copy_bytes_per_s")
    for name, figure in results.measured("decoding").items():
        floor = bandwidth and figure["bytes"] / bandwidth
        rows.append(
            [
                name,
                milliseconds(figure["triton"]),
                share(floor, figure["triton"]["median_s"]),
                ratio(results, figure["torch"], figure["triton"]),
            ]
        )
    return rows if len(rows) > 1 else []


SECTION = Section(
    name="decoding",
    title="Decoding steps, one layer each, bfloat16",
    order=50,
    budget_s=60,
    parts=parts,
    table=table,
)
