"""Which other settings of a run that does not fit into memory would make it fit, with numbers.

Changes are made one upon the other, those that cost least first. Then those are taken back that
turn out not to be needed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from nemotron3.models.config import ModelConfig
from nemotron3.models.lora import LoRAConfig
from nemotron3.models.lora.adapter import chosen_products, products
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig
from nemotron3.runtime.memory import MemoryPlan, in_units
from nemotron3.training.trainer import TrainingConfig


class Settings(NamedTuple):
    """What can be changed of a run to make it need less memory."""

    training: TrainingConfig
    lora: LoRAConfig | None
    max_num_seqs: int | None = None
    """Rollouts that are sampled at once; None where that is not to be changed."""

    def with_adapter(self, lora: LoRAConfig) -> "Settings":
        """An adapter instead of what is trained."""
        return self._replace(training=replace(self.training, bias_update_rate=0.0), lora=lora)


class Remedy(NamedTuple):
    """Changes with which a run fits."""

    changes: Mapping[str, str]
    """New values by the fields' names in a run, such as `training.recompute`."""
    total: int
    """Bytes of the plan with these changes."""

    def text(self) -> str:
        """The changes for a person."""
        said = ", ".join(f"{name} {value}" for name, value in self.changes.items())
        return f"{said} ({in_units(self.total)} at most)"


def find_remedy(
    settings: Settings,
    plan: Callable[[Settings], MemoryPlan],
    config: ModelConfig,
    *,
    usable: int,
    needed: Callable[[MemoryPlan], int],
    may_adapt: bool,
    least_tokens: int = 1,
) -> Remedy | None:
    """Changes with which the plan of a model's training fits into `usable` bytes.

    They make its sum fit if that is possible, else what is `needed` at least; None if nothing does.
    `may_adapt` is whether an adapter could be trained instead of all parameters, `least_tokens` the
    fewest that a forward pass must hold.
    """
    changes = list(_changes(settings, config, least_tokens=least_tokens, may_adapt=may_adapt))

    def fits(chosen: Sequence[_Change], size: Callable[[MemoryPlan], int]) -> bool:
        return size(plan(_changed(settings, chosen))) <= usable

    for size in (_total, needed):
        enough = next((n for n in range(len(changes) + 1) if fits(changes[:n], size)), None)
        if enough is None:
            continue
        chosen = changes[:enough]
        for change in tuple(chosen):
            fewer = [other for other in chosen if other is not change]
            if fits(fewer, size):
                chosen = fewer
        changed = _changed(settings, chosen)
        before = _values(settings)
        values = {name: v for name, v in _values(changed).items() if v != before.get(name)}
        return Remedy(values, plan(changed).total)
    return None


_Change = Callable[[Settings], Settings]


def _changes(
    settings: Settings, config: ModelConfig, *, least_tokens: int, may_adapt: bool
) -> Iterator[_Change]:
    """What can be changed, what costs least first."""
    yield lambda s: s._replace(training=replace(s.training, recompute=True))
    narrow = PrecisionConfig(activations="bfloat16")
    yield lambda s: s._replace(training=replace(s.training, precision=narrow))
    size = _least_microbatch(settings.training, least_tokens)
    yield lambda s: s._replace(training=replace(s.training, microbatch_size=size))
    for seqs in _smaller(settings.max_num_seqs or 0):
        yield lambda s, seqs=seqs: s._replace(max_num_seqs=seqs)
    if settings.lora is None and not may_adapt:
        return
    lora = settings.lora or LoRAConfig()
    yield lambda s: s.with_adapter(lora)
    for rank in _smaller(lora.rank):
        yield lambda s, rank=rank: s.with_adapter(replace(s.lora or lora, rank=rank))
    if targets := _without_experts(config, lora):
        yield lambda s: s.with_adapter(replace(s.lora or lora, targets=targets))


def _smaller(count: int) -> list[int]:
    return [part for part in (count // 2, count // 4) if part]


def _changed(settings: Settings, changes: Sequence[_Change]) -> Settings:
    for change in changes:
        settings = change(settings)
    return settings


def _values(settings: Settings) -> dict[str, str]:
    training, lora, max_num_seqs = settings
    values = {
        "training.recompute": str(training.recompute).lower(),
        "training.precision.activations": training.precision.activations,
        "training.microbatch_size": str(training.microbatch_size),
    }
    if max_num_seqs is not None:
        values["max_num_seqs"] = str(max_num_seqs)
    if lora is not None:
        values["lora.rank"] = str(lora.rank)
        if lora.targets != LoRAConfig.targets:
            values["lora.targets"] = " ".join(lora.targets)
    return values


def _least_microbatch(training: TrainingConfig, least_tokens: int) -> int:
    return next(
        size
        for size in range(1, training.microbatch_size + 1)
        if training.batch_size % size == 0
        and (size * training.seq_len >= least_tokens or size == training.microbatch_size)
    )


def _without_experts(config: ModelConfig, lora: LoRAConfig) -> tuple[str, ...]:
    """Targets that name the same products, but for the stacked experts."""
    with torch.device("meta"):
        model = LanguageModel(config)
    chosen = chosen_products(model, lora.targets)
    kept = [name for name, product in chosen.items() if len(product.shape) == 2]
    if len(kept) == len(chosen):
        return ()
    others = products(model).keys() - {*kept}
    return tuple(dict.fromkeys(_shortest_end(name, others) for name in kept))


def _shortest_end(name: str, others: set[str]) -> str:
    """The shortest end of a product's name that names none of some others."""
    parts = name.split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return next(end for end in ends if not any(o == end or o.endswith(f".{end}") for o in others))


def _total(plan: MemoryPlan) -> int:
    return plan.total
