"""`nemotron3 info`: the structure and costs of a model, without its weights."""

import argparse
import json
from pathlib import Path
from typing import Any

from nemotron3.checkpoint import ShardedReader
from nemotron3.cli.memory_options import with_defaults
from nemotron3.cli.precision_table import precision_page, precision_record
from nemotron3.cli.training_memory import training_memory, training_page
from nemotron3.errors import ConfigError
from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import (
    ModelCosts,
    forward_flops_per_token,
    kv_bytes_per_token,
    model_costs,
    state_bytes_per_sequence,
)
from nemotron3.models.huggingface import read_config, stored_weight_format
from nemotron3.recipes.input_files import check_model_directory


def info(known: argparse.Namespace) -> int:
    """Print a preset's or a directory's parameters, state and FLOPs, or the memory of training."""
    known = with_defaults(known)
    model, context, as_json = known.model, known.context, known.json
    if context < 1:
        raise ConfigError(f"--context is {context}; it must be 1 or more")
    path = Path(model)
    if path.exists() or len(path.parts) > 1:
        check_model_directory(path)
    config = read_config(path) if path.is_dir() else ModelConfig.preset(model)
    if known.precision is not None:
        if known.training is not None:
            raise ConfigError("--precision and --training print different things; give one")
        rows = precision_record(config, known.precision)
        page = precision_page(model, config, known.precision)
        print(json.dumps({"model": model, "products": rows}, indent=2) if as_json else page)
        return 0
    if known.training is not None:
        record = training_memory(config, known)
        print(json.dumps(record, indent=2) if as_json else training_page(record, config, known))
        return 0
    facts = model_facts(model, config, context)
    if any(path.glob("*.safetensors")):
        facts["weights"] = {
            "bytes": ShardedReader(path).total_bytes,
            "format": stored_weight_format(path) or "plain",
        }
    print(json.dumps(facts, indent=2) if as_json else _page(facts, config, model_costs(config)))
    return 0


def model_facts(name: str, config: ModelConfig, context: int) -> dict[str, Any]:
    """Everything that `info` prints, as a record."""
    costs = model_costs(config)
    states, conv_states = state_bytes_per_sequence(config)
    kv = kv_bytes_per_token(config)
    return {
        "model": name,
        "pattern": config.hybrid_override_pattern,
        "layers": {
            mixer.label: config.layers.count(mixer)
            for mixer in config.mixers.values()
            if mixer in config.layers
        },
        "parameters": costs.parameters,
        "active_parameters": costs.active,
        "total": costs.total,
        "total_active": costs.total_active,
        "mtp": {
            "depths": config.pattern.num_mtp_depths,
            "parameters": costs.mtp_parameters,
            "active": costs.mtp_active,
        },
        "bytes": {
            "kv_per_token_bf16": kv,
            "ssm_state_per_sequence_fp32": states,
            "conv_state_per_sequence_bf16": conv_states,
            "sequence_at_context": context * kv + states + conv_states,
        },
        "context": context,
        "forward_flops_per_token": forward_flops_per_token(config, context=context),
        "training_flops_per_token": 3
        * forward_flops_per_token(config, context=context, with_mtp=True),
    }


def _page(facts: dict[str, Any], config: ModelConfig, costs: ModelCosts) -> str:
    layers = ", ".join(f"{count} {kind}" for kind, count in facts["layers"].items())
    lines = [
        f"{facts['model']}: {config.num_layers} layers ({layers}), width {config.hidden_size:,}, "
        f"vocabulary {config.vocab_size:,}",
        f"  {config.hybrid_override_pattern}",
        "",
        f"{'parameters':<22}{'all':>18}{'active per token':>20}",
    ]
    lines += [
        f"  {part:<20}{count:>18,}{costs.active.get(part, 0):>20,}"
        for part, count in costs.parameters.items()
    ]
    lines += [
        f"  {'total':<20}{costs.total:>18,}{costs.total_active:>20,}",
        "  (active: with the output layer, without the input table)",
    ]
    if costs.mtp_parameters:
        lines.append(
            f"  {'MTP block':<20}{costs.mtp_parameters:>18,}{costs.mtp_active:>20,}"
            f"   shared by {facts['mtp']['depths']} depths, not in the total"
        )
    bytes_ = facts["bytes"]
    if "weights" in facts:
        held = facts["weights"]
        lines.append(f"  {'weights as stored':<20}{held['bytes']:>18,} bytes ({held['format']})")
    lines += [
        "",
        f"{'state of a sequence':<22}",
        f"  {'keys and values':<20}{bytes_['kv_per_token_bf16']:>18,} bytes per token (bfloat16)",
        f"  {'state-space':<20}{bytes_['ssm_state_per_sequence_fp32']:>18,} bytes (float32)",
        f"  {'convolution':<20}{bytes_['conv_state_per_sequence_bf16']:>18,} bytes (bfloat16)",
        f"  {'at ' + format(facts['context'], ',') + ' tokens':<20}"
        f"{bytes_['sequence_at_context']:>18,} bytes",
        "",
        f"{'arithmetic':<22}at {facts['context']:,} tokens",
        f"  {'forward':<20}{facts['forward_flops_per_token'] / 1e9:>18,.3f} GFLOP per token",
        f"  {'training':<20}{facts['training_flops_per_token'] / 1e9:>18,.3f} GFLOP per token"
        + (", MTP included" if costs.mtp_parameters else ""),
    ]
    return "\n".join(lines)
