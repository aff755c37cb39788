"""Options of the verbs that run an engine, and the engine that they describe."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron3.errors import ConfigError

if TYPE_CHECKING:
    from nemotron3.inference.async_llm import AsyncLLM
    from nemotron3.inference.config import EngineConfig
    from nemotron3.inference.served_adapters import ServedModels

_MIB = 2**20


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Where the model is, where it runs, and what it may hold."""
    parser.add_argument("path", type=Path, help="a model directory, such as runs/tiny/model")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="most tokens of prompt and answer together (default: the model's own limit)",
    )
    engine.add_argument(
        "--max-num-seqs",
        type=int,
        metavar="N",
        help="answers that are written at the same time (default 32)",
    )
    engine.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="prompt tokens read in one step; longer prompts are read in parts, so that other "
        "answers go on between (default 8192 on a GPU, 2048 elsewhere)",
    )
    engine.add_argument(
        "--max-draft-tokens",
        type=int,
        metavar="N",
        help="tokens drafted ahead by the model's multi-token prediction; they change the speed "
        "and never the answer; 0 for none (default: 3 where it can)",
    )
    engine.add_argument(
        "--kv-cache-mib",
        type=int,
        metavar="MIB",
        help="memory for keys and values (default: what the context of all answers wants, at most "
        "0.9 of a GPU's memory that weights leave free, less what states, kept prefixes and a step "
        "take; elsewhere a quarter of what is free)",
    )
    engine.add_argument(
        "--prefix-cache-mib",
        type=int,
        metavar="MIB",
        help="memory for prompts that begin alike; 0 for none (default 1024)",
    )
    engine.add_argument(
        "--mamba-ssm-cache-dtype",
        choices=["float32", "float16", "int8"],
        help="what the scan's states are kept in between tokens; the narrow ones are rounded "
        "stochastically (default float32)",
    )
    engine.add_argument(
        "--mamba-cache-philox-rounds",
        type=int,
        metavar="N",
        help="rounds of Philox for the random bits of that rounding (default 5)",
    )
    engine.add_argument(
        "--kv-cache-dtype",
        choices=["auto", "bfloat16", "fp8"],
        help="what keys and values are kept in (default auto: as the model computes)",
    )
    engine.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="auto takes the model's generation_config.json for defaults of sampling (temperature, "
        "top_p, top_k, min_p, repetition_penalty, max_new_tokens), none does not (default auto)",
    )
    engine.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    engine.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="what weights and activations are held in (default auto: as the weights are stored); "
        "on a CPU bfloat16 is faster where the processor multiplies it (AVX512_BF16)",
    )
    engine.add_argument(
        "--weights",
        choices=("auto", "int8", "fp8", "nvfp4"),
        default="auto",
        help="number format of the matrices of layers, experts and output layer, to which plain "
        "ones are rounded as they are read (default auto: as they are stored)",
    )
    engine.add_argument(
        "--activations",
        choices=("auto", "int8"),
        default="auto",
        help="what products with matrices in int8 and nvfp4 round their activations to, on a CPU: "
        "faster, and answers change a little (default auto: nothing)",
    )


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """A LoRA adapter."""
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="DIR",
        help="a LoRA adapter for the model, such as runs/tiny-sft/adapter",
    )


def add_adapters_option(parser: argparse.ArgumentParser) -> None:
    """LoRA adapters by name."""
    parser.add_argument(
        "--lora",
        action="append",
        metavar="NAME=DIR",
        help="a LoRA adapter that clients choose by NAME in `model` (may be repeated); each has an "
        "engine of its own, with the limits above, and merged copies of the weights it changes; "
        "beside weights that are stored quantized it stays apart",
    )


def load_engine(known: argparse.Namespace) -> "AsyncLLM":
    """The engine that the options describe, with the adapter of `--lora DIR`."""
    from nemotron3.inference.async_llm import AsyncLLM
    from nemotron3.recipes.input_files import check_model_directory

    options = _load_options(known)
    check_model_directory(known.path)
    return AsyncLLM(known.path, lora=known.lora, **options)


def load_engines(known: argparse.Namespace) -> "ServedModels":
    """The engines that the options describe: the model's, and one for each `--lora NAME=DIR`."""
    from nemotron3.inference.served_adapters import load_served
    from nemotron3.recipes.input_files import check_model_directory

    adapters, options = named_adapters(known.lora or ()), _load_options(known)
    check_model_directory(known.path)
    return load_served(known.path, adapters, **options)


def named_adapters(options: Sequence[str]) -> dict[str, Path]:
    """Directories of adapters by name, from NAME=DIR of each."""
    adapters: dict[str, Path] = {}
    for option in options:
        name, equals, directory = option.partition("=")
        if not (name and equals and directory):
            raise ConfigError(
                f"--lora is {option!r}; give a name and the adapter's directory, as in: "
                "--lora chat=runs/tiny-sft/adapter"
            )
        if name in adapters:
            raise ConfigError(f"--lora has two adapters named {name!r}; name each its own way")
        adapters[name] = Path(directory)
    return adapters


def _load_options(known: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "config": engine_config(known),
        "device": known.device,
        "dtype": None if known.dtype == "auto" else getattr(torch, known.dtype),
        "weights": None if known.weights == "auto" else known.weights,
        "generation_config": known.generation_config,
    }


def engine_config(known: argparse.Namespace) -> "EngineConfig":
    """The limits that the options describe; what is not given is the engine's own default."""
    from nemotron3.inference.config import EngineConfig
    from nemotron3.models.cache.state_precision import StatePrecision

    keys = {"auto": "model", "fp8": "float8"}.get(known.kv_cache_dtype, known.kv_cache_dtype)
    state = {
        "ssm": known.mamba_ssm_cache_dtype,
        "philox_rounds": known.mamba_cache_philox_rounds,
        "keys": keys,
    }
    given: dict[str, Any] = {
        name: getattr(known, name, None)
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_waiting",
            "max_num_batched_tokens",
            "max_draft_tokens",
        )
    }
    for option, name in (
        ("kv_cache_mib", "kv_cache_bytes"),
        ("prefix_cache_mib", "prefix_cache_bytes"),
    ):
        size = getattr(known, option)
        given[name] = None if size is None else size * _MIB
    given["activations"] = None if known.activations == "auto" else known.activations
    given["return_routed_experts"] = getattr(known, "enable_return_routed_experts", None)
    given["state"] = StatePrecision(**_given(state))
    return EngineConfig(**_given(given))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
