"""The kernel of decoding steps: states read once, advanced by a few tokens, written.

A step of one token per sequence, and of four as when drafted tokens are checked and the state after
each is kept, for batches of growing size. What binds is moving the states, so the share is of the
copy bandwidth.
"""

import torch
from benchmarks.gpu import cases
from benchmarks.gpu.cases import Case
from benchmarks.gpu.figures import milliseconds, ratio, share
from benchmarks.gpu.launches import Launches
from benchmarks.gpu.record import Figure, Results
from benchmarks.gpu.section import Part, Rows, Section
from benchmarks.gpu.sections.kernels import forward
from benchmarks.gpu.setting import Draw, Setting


def parts(setting: Setting) -> dict[str, Part]:
    return {
        name: lambda case=case: measure(case, setting) for name, case in all_cases(setting).items()
    }


def all_cases(setting: Setting) -> dict[str, Case]:
    """By model, batch and tokens."""
    batches = (1, 2) if setting.is_toy else (1, 8, 64, 256)
    found: dict[str, Case] = {}
    for name, config in setting.models().items():
        mamba = config.mamba
        assert mamba is not None
        for length in (1, 4):
            for rows in batches:
                words = f"{name}, batch {rows}, {length} token{'s' * (length > 1)}"
                found[words] = cases.decoding_steps(
                    mamba, rows, length, torch.bfloat16, kept=length > 1
                )
    return found


def measure(case: Case, setting: Setting) -> Figure:
    """One layer's step."""
    problem, launches = case.draw(Draw(setting.device, 1)), Launches()
    kernel, plain = (problem.call(backend) for backend in ("triton", "torch"))
    with torch.no_grad():
        outputs = kernel(*problem.operands)
    return {
        "size": case.size,
        "bytes": cases.forward_bytes(problem, outputs),
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
    title="A decoding step of one Mamba layer's states",
    order=50,
    budget_s=40,
    parts=parts,
    table=table,
)
