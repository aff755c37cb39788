"""`nemotron3 info MODEL --training sft`: what training keeps in memory, part by part."""

import argparse
from dataclasses import replace
from typing import Any

import torch

from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import model_costs
from nemotron3.models.lora import LoRAConfig
from nemotron3.models.precision import PrecisionConfig
from nemotron3.recipes.memory import memory_plan, needed_bytes
from nemotron3.runtime.devices import GPU
from nemotron3.runtime.memory import MemoryPlan, in_units
from nemotron3.training.memory_plan import LowRankPlan, low_rank_plan
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.schedules import Constant
from nemotron3.training.trainer import TrainingConfig

_ROLLOUTS = 64
"""That are sampled at once."""


def training_memory(config: ModelConfig, known: argparse.Namespace) -> dict[str, Any]:
    """The plan of training a model on a GPU as the options have it, as a record."""
    low_rank = _low_rank(config, known)
    plan = _plan(config, known, low_rank)
    record = _record(plan, known.device_memory)
    if low_rank is None:
        return record
    narrow = _plan(config, known, replace(low_rank, frozen_dtype=torch.bfloat16))
    return record | {"with_frozen_bfloat16": _record(narrow, known.device_memory)}


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
    if (narrow := record.get("with_frozen_bfloat16")) is not None:
        lines += [
            "",
            "Training keeps frozen weights in float32. Kept in bfloat16, the sum would be "
            f"{in_units(narrow['total'])},",
            f"  which {_verdict(narrow)}",
        ]
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


def _plan(
    config: ModelConfig, known: argparse.Namespace, low_rank: LowRankPlan | None
) -> MemoryPlan:
    training = TrainingConfig(
        steps=1,
        batch_size=known.batch,
        microbatch_size=known.batch,
        seq_len=known.seq_len,
        optimizer=AdamWConfig(lr=1e-4),
        schedule=Constant(warmup_steps=0),
        precision=PrecisionConfig(activations=known.activations),
        recompute=known.recompute,
    )
    engine = EngineConfig(max_num_seqs=_ROLLOUTS, max_model_len=known.seq_len, max_draft_tokens=0)
    return memory_plan(
        config,
        training,
        GPU,
        mtp_depths=config.pattern.num_mtp_depths if known.training != "rl" else 0,
        low_rank=low_rank,
        engine=engine if known.training == "rl" else None,
        device_bytes=known.device_memory,
    )


def _low_rank(config: ModelConfig, known: argparse.Namespace) -> LowRankPlan | None:
    if known.lora_rank is None:
        return None
    lora = LoRAConfig(rank=known.lora_rank)
    if known.lora_targets:
        lora = replace(lora, targets=tuple(known.lora_targets.split(",")))
    try:
        return low_rank_plan(config, lora)
    except ConfigError as error:
        raise error.renamed({"targets": "--lora-targets"}) from None
