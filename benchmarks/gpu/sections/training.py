"""Training steps with 8,192 tokens: tokens per second, and the share of the product rate.

`small` runs whole steps: float32 master weights, bfloat16 products, multi-token prediction, the
loss, clipping and AdamW. Of `nano` and `super` one group of layers, up to the first attention, runs
forward and backward on random hidden states; their optimizer, embedding and output layer are
omitted, since a group of `super` with them does not fit on one GPU. FLOPs are those that the model
needs (nemotron3.models.costs), not those that were executed.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from benchmarks.gpu.figures import NONE, milliseconds, share
from benchmarks.gpu.record import Figure, Results
from benchmarks.gpu.section import Part, Rows, Section
from benchmarks.gpu.setting import Draw, Setting
from benchmarks.limits import backbone_flops
from benchmarks.models import configs, objective_of, targets, tokens_of
from benchmarks.workloads import OPTIMIZER

from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import forward_flops_per_token
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig, apply_precision
from nemotron3.training.optimizers import build_optimizer
from nemotron3.training.step import TrainingStep

_GOAL = 0.4
_SEQUENCES = 4
"""Sequences per step of `small`."""


def parts(setting: Setting) -> dict[str, Part]:
    small = configs()["toy"] if setting.is_toy else ModelConfig.preset("small")
    found: dict[str, Part] = {"small, whole step": lambda: whole_step(small, setting)}
    for name, config in setting.models().items():
        group = layer_group(config)
        words = f"{name}, {group.hybrid_override_pattern}"
        found[words] = lambda group=group: group_step(group, setting)
        found[f"{words}: where the time goes"] = lambda group=group: profile(group, setting)
    return found


def layer_group(config: ModelConfig) -> ModelConfig:
    """The layers up to the first attention and the MoE layer after it, with a tiny vocabulary."""
    pattern = config.hybrid_override_pattern
    group = pattern[: pattern.index("*") + 2]
    return replace(config, hybrid_override_pattern=group, vocab_size=16)


def whole_step(config: ModelConfig, setting: Setting) -> Figure:
    """A complete training step."""
    model = LanguageModel.from_config(config, device=setting.device)
    apply_precision(model, PrecisionConfig(activations="bfloat16"))
    optimizer = build_optimizer(model, OPTIMIZER)
    tokens = tokens_of(config, _SEQUENCES, setting.tokens).to(setting.device)
    update = TrainingStep(model, optimizer, objective_of(model), clip_grad_norm=1.0)

    def step() -> None:
        update([targets(tokens)], learning_rate=OPTIMIZER.lr)

    flops = 3 * forward_flops_per_token(config, context=setting.tokens, with_mtp=True)
    return _figure(step, tokens.numel(), flops, setting)


def group_step(config: ModelConfig, setting: Setting) -> Figure:
    """Forward and backward of one group."""
    step, forward = _group(config, setting)
    flops = 3 * backbone_flops(config, length=setting.tokens)
    figure = _figure(step, setting.tokens, flops, setting)
    return figure | {"forward": setting.clock.step(forward)}


def _group(config: ModelConfig, setting: Setting) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step, and its forward pass without gradients."""
    model = LanguageModel.from_config(config, device=setting.device, dtype=torch.bfloat16)
    draw = Draw(setting.device, 1)
    x, grad = (
        draw.normal(setting.tokens, config.hidden_size, dtype=torch.bfloat16) for _ in range(2)
    )
    layout = SequenceLayout.packed([setting.tokens])
    x.requires_grad_()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.backbone(x, layout).hidden.backward(grad)

    @torch.no_grad()
    def forward() -> None:
        model.backbone(x, layout)

    return step, forward


def _figure(
    step: Callable[[], None], tokens: int, flops: float, setting: Setting
) -> dict[str, Any]:
    timing = setting.clock.step(step)
    return {
        "tokens": tokens,
        "flops_per_token": flops,
        "step": timing,
        "peak_bytes": setting.clock.peak_bytes(step),
    }


def profile(config: ModelConfig, setting: Setting) -> Figure:
    """The kernels that take most of a step."""
    step, _ = _group(config, setting)
    step()
    if setting.is_toy:
        return {"kernels": []}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    seconds: Counter[str] = Counter()
    for event in profiler.events() or ():
        seconds[event.name] += event.self_device_time_total / 1e6
    return {"kernels": [{"name": n[:100], "seconds": s} for n, s in seconds.most_common(15)]}


def table(results: Results) -> Rows:
    rows = [["", "tokens/s", "of the product rate", "goal", "step, ms", "peak memory"]]
    rate = results.limit("product_flops_per_s")
    for name, figure in results.measured("training").items():
        if "kernels" in figure:
            continue
        seconds, tokens = figure["step"]["median_s"], figure["tokens"]
        achieved = seconds and tokens * figure["flops_per_token"] / seconds
        peak = figure["peak_bytes"]
        rows.append(
            [
                name,
                f"{tokens / seconds:,.0f}" if seconds else NONE,
                share(achieved, rate),
                f"{_GOAL:.0%}",
                milliseconds(figure["step"]),
                f"{peak / 1e9:.1f} GB" if peak else NONE,
            ]
        )
    return rows if len(rows) > 1 else []


SECTION = Section(
    name="training",
    title="Training steps, sequences of 8,192 tokens",
    order=30,
    budget_s=90,
    parts=parts,
    table=table,
)
