"""`nemotron3 info MODEL --training sft`: what training keeps in memory, part by part."""

import argparse
from dataclasses import replace
from typing import Any

from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import model_costs
from nemotron3.models.lora import LoRAConfig
from nemotron3.models.precision import PrecisionConfig
from nemotron3.recipes.memory import memory_plan, needed_bytes, quantized_bytes
from nemotron3.recipes.memory_remedies import Remedy, Settings, find_remedy
from nemotron3.runtime.devices import GPU
from nemotron3.runtime.memory import MemoryPlan, in_units
from nemotron3.training.memory_plan import low_rank_plan
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.schedules import Constant
from nemotron3.training.trainer import TrainingConfig

_ROLLOUTS = 64
"""That are sampled at once."""
_OPTIONS = {
    "training.precision.activations": "--activations",
    "training.microbatch_size": "--batch",
    "lora.rank": "--lora-rank",
    "lora.targets": "--lora-targets",
}
"""How a run's fields are called here."""


def training_memory(config: ModelConfig, known: argparse.Namespace) -> dict[str, Any]:
    """The plan of training a model on a GPU as the options have it, as a record.

    `remedy` are options with which the device could hold it, or None where it can, and where
    nothing helps.
    """
    if known.lora_rank is None and quantized_bytes(known.model):
        raise ConfigError(
            f"{known.model} holds quantized weights, which have no gradients; give --lora-rank, "
            "for an adapter beside them"
        )
    settings = Settings(_training(known), _lora(config, known))
    record = _record(_plan(config, known, settings), known.device_memory)
    found = None
    if record["total"] > known.device_memory:
        found = find_remedy(
            settings,
            lambda changed: _plan(config, known, changed),
            config,
            usable=known.device_memory,
            needed=lambda plan: needed_bytes(plan, GPU),
            may_adapt=known.training != "pretrain",
            least_tokens=known.seq_len,
        )
    return record | {
        "remedy": None if found is None else {"options": _options(found), "total": found.total}
    }


def _options(found: Remedy) -> str:
    """A remedy as it is typed."""
    typed = {name: value.replace(" ", ",") for name, value in found.changes.items()}
    flag = typed.pop("training.recompute", None)
    words = [f"{_OPTIONS[name]} {value}" for name, value in typed.items()]
    return " ".join([*words, *(["--recompute"] if flag else [])])


def training_page(record: dict[str, Any], config: ModelConfig, known: argparse.Namespace) -> str:
    """The same as a table."""
    what = {"pretrain": "pre-training", "sft": "fine-tuning", "rl": "reinforcement learning"}
    costs = model_costs(config)
    kind = "all parameters" if known.lora_rank is None else f"LoRA of rank {known.lora_rank}"
    lines = [
        f"memory of {what[known.training]}, {kind}: {known.batch} x {known.seq_len:,} tokens at a "
        f"time in {known.activations}{', recomputed by block' if known.recompute else ''}",
        f"  {(costs.total + costs.mtp_parameters) / 1e9:.2f}B parameters; * is an upper bound, the "
        "rest is exact",
    ]
    lines += [
        f"  {part['name']:<26}{in_units(part['bytes']):>12}{' *' if part['is_estimate'] else ''}"
        for part in record["parts"]
    ]
    lines.append(f"  {'sum':<26}{in_units(record['total']):>12}")
    lines.append(f"  {_verdict(record)}")
    if (found := record["remedy"]) is not None:
        lines.append(f"  it fits with {found['options']}: {in_units(found['total'])}")
    return "\n".join(lines)


def _verdict(record: dict[str, Any]) -> str:
    memory, least = in_units(record["device_memory"]), in_units(record["least"])
    if record["total"] <= record["device_memory"]:
        return f"fits into {memory}"
    if record["least"] <= record["device_memory"]:
        return f"may fit into {memory}: {least} are needed at least"
    return f"does not fit into {memory}: {least} are needed at least"


def _record(plan: MemoryPlan, device_memory: int) -> dict[str, Any]:
    least = needed_bytes(plan, GPU)
    return {
        "parts": [
            {"name": part.name, "bytes": part.num_bytes, "is_estimate": part.is_estimate}
            for part in plan.parts
        ],
        "total": plan.total,
        "least": least,
        "device_memory": device_memory,
    }


def _training(known: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        steps=1,
        batch_size=known.batch,
        microbatch_size=known.batch,
        seq_len=known.seq_len,
        optimizer=AdamWConfig(lr=1e-4),
        schedule=Constant(warmup_steps=0),
        precision=PrecisionConfig(activations=known.activations),
        recompute=known.recompute,
    )


def _plan(config: ModelConfig, known: argparse.Namespace, settings: Settings) -> MemoryPlan:
    engine = EngineConfig(max_num_seqs=_ROLLOUTS, max_model_len=known.seq_len, max_draft_tokens=0)
    lora, quantized = settings.lora, quantized_bytes(known.model)
    return memory_plan(
        config,
        settings.training,
        GPU,
        mtp_depths=config.pattern.num_mtp_depths if known.training != "rl" else 0,
        low_rank=None if lora is None else low_rank_plan(config, lora, quantized),
        engine=engine if known.training == "rl" else None,
        device_bytes=known.device_memory,
    )


def _lora(config: ModelConfig, known: argparse.Namespace) -> LoRAConfig | None:
    """The adapter that the options ask for; ConfigError for a target that the model has not."""
    if known.lora_rank is None:
        return None
    lora = LoRAConfig(rank=known.lora_rank)
    if known.lora_targets:
        lora = replace(lora, targets=tuple(known.lora_targets.split(",")))
    try:
        low_rank_plan(config, lora)
    except ConfigError as error:
        raise error.renamed({"targets": "--lora-targets"}) from None
    return lora
