"""Other implementations: mamba-ssm's scan, PyTorch's grouped products, transformers' layers.

One that is not installed is reported as left out. mamba-ssm needs no CUDA build for its Triton
scan: its pure-Python wheel is enough, and only the scan's module is imported, since the package's
`__init__` needs compiled kernels. transformers without its optional kernels runs plain PyTorch.
Each implementation must agree with ours before either is timed.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from benchmarks.gpu import cases
from benchmarks.gpu.cases import Problem
from benchmarks.gpu.figures import milliseconds, ratio
from benchmarks.gpu.record import Figure, Results
from benchmarks.gpu.section import Part, Rows, Section
from benchmarks.gpu.sections.kernels import forward, training
from benchmarks.gpu.sections.parity import difference, tolerance
from benchmarks.gpu.setting import Draw, Setting
from torch import Tensor
from torch.nn import functional as F

from benchmarks import models
from nemotron3.models.config import MambaConfig, ModelConfig, MoEConfig
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd

_LOGITS = 1e-3
"""Largest difference of transformers' float32 logits and gradients on a GPU, by their scale."""


def parts(setting: Setting) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for name, config in setting.models().items():
        mamba, moe = config.mamba, config.moe
        assert mamba is not None
        assert moe is not None
        found[f"mamba-ssm, scan of {name}"] = lambda m=mamba: mamba_ssm_scan(m, setting)
        width = moe.moe_latent_size or config.hidden_size
        found[f"grouped_mm, products of {name}"] = lambda m=moe, w=width: grouped(m, w, setting)
    name, config = next(iter(setting.models().items()))
    found[f"transformers, layers of {name}"] = lambda: transformers_layers(config, setting)
    return found


def mamba_ssm_scan(mamba: MambaConfig, setting: Setting) -> Figure:
    """mamba-ssm's scan, on our operands."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return {"left_out": "mamba_ssm is not installed (docs/guides/gpu.md says how to bring it)"}
    if setting.is_toy:
        return {"left_out": "mamba_ssm's kernels do not run in Triton's interpreter"}
    theirs = _mamba_ssm_module().mamba_chunk_scan_combined
    case = cases.scan(mamba, (setting.tokens,), torch.bfloat16)
    operands = case.draw(Draw(setting.device, 1)).operands[:6]  # a new sequence has no state
    segments = Segments((setting.tokens,))

    def other(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> list[Tensor]:
        y = theirs(x[None], dt[None], A, B[None], C[None], mamba.chunk_size, D=D)
        return [y[0]]

    def ours(*t: Tensor) -> list[Tensor]:
        return [ssd(*t, segments=segments, chunk_size=mamba.chunk_size, backend="triton")[0]]

    with torch.no_grad():
        differs = difference(other(*operands)[0], ours(*operands)[0])
    figure = {"size": case.size, "difference": differs}
    if not differs <= tolerance(torch.bfloat16, setting):
        return figure
    return figure | _side_by_side(
        Problem(operands, lambda _: ours), Problem(operands, lambda _: other), setting
    )


def _mamba_ssm_module() -> ModuleType:
    """mamba-ssm's module of the scan, under a dummy package that skips its `__init__`."""
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        assert spec is not None
        bare = ModuleType("mamba_ssm")
        bare.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["mamba_ssm"] = bare
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


def grouped(moe: MoEConfig, width: int, setting: Setting) -> Figure:
    """Both products of the routed experts, with sorted rows; ours also sorts and combines."""
    if not hasattr(F, "grouped_mm"):
        return {"left_out": f"PyTorch {torch.__version__} has no grouped_mm"}
    k, hidden = moe.num_experts_per_tok, moe.moe_intermediate_size
    case = cases.experts(
        setting.tokens, moe.n_routed_experts, k,
        width=width, hidden=hidden, dtype=torch.bfloat16,
    )  # fmt: skip
    problem = case.draw(Draw(setting.device, 1))
    x, weights, up, down = problem.operands
    draw = Draw(setting.device, 1)
    chosen = draw.choices(setting.tokens, moe.n_routed_experts, k).flatten()
    experts, order = chosen.sort(stable=True)
    counts = torch.bincount(experts, minlength=moe.n_routed_experts)
    ends = counts.cumsum(0).to(torch.int32)
    rows = x[order // k] * weights.flatten()[order, None].sqrt()

    def theirs(rows: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        h = F.relu(F.grouped_mm(rows, up.transpose(1, 2), offs=ends)).square()
        return [F.grouped_mm(h, down.transpose(1, 2), offs=ends)]

    with torch.no_grad():
        y = theirs(rows, up, down)[0].float()
        summed = y.new_zeros(len(x), width).index_add_(0, order // k, y)
        differs = difference(summed, problem.call("triton")(*problem.operands)[0])
    figure = {"size": case.size, "difference": differs}
    if not differs <= tolerance(torch.bfloat16, setting):
        return figure
    return figure | _side_by_side(problem, Problem([rows, up, down], lambda _: theirs), setting)


def _side_by_side(ours: Problem, theirs: Problem, setting: Setting) -> dict[str, Any]:
    """Time forward and training of both programs."""
    kernel, problems = setting.clock.kernel, {"ours": ours, "theirs": theirs}
    return {
        "forward": {n: kernel(forward(p, p.call("triton"))) for n, p in problems.items()},
        "training": {n: kernel(training(p, p.call("triton"))) for n, p in problems.items()},
    }


def transformers_layers(config: ModelConfig, setting: Setting) -> Figure:
    """Three Mamba layers, two MoE layers and one attention layer, with an eighth of the experts.

    Saving and loading all experts would take longer than the measurement. Parity is checked in
    float32, where rounding changes no router's choice; times are those of bfloat16.
    """
    if importlib.util.find_spec("transformers") is None:
        return {"left_out": "transformers is not installed"}
    assert config.moe is not None
    experts = max(config.moe.num_experts_per_tok, config.moe.n_routed_experts // 8)
    length = min(setting.tokens, 4096)
    less = replace(
        config,
        hybrid_override_pattern="MEM*EM",
        vocab_size=min(config.vocab_size, 8192),
        moe=replace(config.moe, n_routed_experts=experts),
    )
    with tempfile.TemporaryDirectory() as folder:
        pair = models.build_pair(less, Path(folder))
    pair.ours.to(setting.device)
    pair.theirs.to(setting.device)
    differences = models.parity(pair, length=24 if setting.is_toy else 128, steps=4)
    size = f"MEM*EM with {experts} experts, {length} tokens"
    figure: dict[str, Any] = {"size": size, "difference": max(differences.values())}
    if not figure["difference"] <= _LOGITS:
        return figure
    pair.ours.to(torch.bfloat16)
    pair.theirs.to(torch.bfloat16)
    tokens = models.tokens_of(less, 1, length).to(setting.device)
    return figure | {
        "forward": setting.clock.steps(
            {
                "ours": _without_gradients(lambda: pair.ours(tokens)),
                "theirs": _without_gradients(lambda: pair.theirs(tokens, use_cache=False)),
            }
        ),
        "training": setting.clock.steps(
            {
                "ours": _backward(pair.ours, lambda: models.our_loss(pair.ours, tokens)),
                "theirs": _backward(pair.theirs, lambda: models.their_loss(pair.theirs, tokens)),
            }
        ),
    }


def _without_gradients(action: Callable[[], object]) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> None:
        action()

    return run


def _backward(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    return run


def table(results: Results) -> Rows:
    rows = [["", "forward, ms: ours", "theirs", "", "training, ms: ours", "theirs", ""]]
    for name, figure in results.measured("peers").items():
        if "forward" not in figure:
            rows.append([name, f"**differs by {figure['difference']:.1e}**", "", "", "", "", ""])
            continue
        row = [name]
        for way in ("forward", "training"):
            ours, theirs = figure[way]["ours"], figure[way]["theirs"]
            row += [milliseconds(ours), milliseconds(theirs), ratio(results, theirs, ours)]
        rows.append(row)
    return rows if len(rows) > 1 else []


SECTION = Section(
    name="peers",
    title="Beside others",
    order=40,
    budget_s=100,
    parts=parts,
    table=table,
)
