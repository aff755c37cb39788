"""Engines for a model and several adapters of it, side by side in one process.

Each adapter has an engine of its own. Its model shares all tensors with the base model except those
that the adapter changes: of these it has merged copies, so an adapter of attention and Mamba costs
a small part of the model, and one of all experts nearly the whole. Keys, states and cached prefixes
are the engine's own; where `kv_cache_bytes` is not given, the engines share what one would take.

Of a model whose weights are stored quantized an adapter has no merged copies: its own tensors stand
beside the shared codes.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.inference.base_llm import load_model, tokenizer_directory, with_adapter
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine.memory import cache_bytes
from nemotron3.inference.generation_config import Source
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.weights import WeightFormat
from nemotron3.text import Tokenizer


class ServedAdapter(NamedTuple):
    """An adapter of a base model, with an engine of its own."""

    llm: AsyncLLM
    directory: Path
    merged_bytes: int
    """Memory of its weights, merged or apart, beside those of the base model."""


class ServedModels(NamedTuple):
    """A base model and its adapters."""

    base: AsyncLLM
    adapters: dict[str, ServedAdapter]
    """By the names that clients send."""


def load_served(
    path: Path,
    adapters: Mapping[str, Path],
    *,
    config: EngineConfig | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    weights: WeightFormat | None = None,
    generation_config: Source = "auto",
) -> ServedModels:
    """Load a model directory and adapters for it; all are read before an engine starts.

    With `weights` nothing is shared: an adapter is merged before the weights are rounded, so each
    one's model is a whole one.
    """
    config = config or EngineConfig()
    tokenizers = [
        Tokenizer.from_directory(tokenizer_directory(path, directory))
        for directory in (None, *adapters.values())
    ]
    model = load_model(path, device=device, dtype=dtype, weights=weights)
    models: dict[str, LanguageModel] = {}
    for name, directory in adapters.items():
        models[name] = (
            with_adapter(model, directory)
            if weights is None
            else load_model(path, device=device, dtype=dtype, weights=weights, lora=directory)
        )
    if models and config.kv_cache_bytes is None:
        share = cache_bytes(model, config, model.device, engines=1 + len(models))
        config = replace(config, kv_cache_bytes=share)
    engines: list[AsyncLLM] = []
    try:
        for each, tokenizer in zip((model, *models.values()), tokenizers, strict=True):
            engines.append(
                AsyncLLM(
                    each, tokenizer=tokenizer, config=config, generation_config=generation_config
                )
            )
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    base, *others = engines
    served = {
        name: ServedAdapter(engine, adapters[name], _own_bytes(models[name], model))
        for name, engine in zip(models, others, strict=True)
    }
    return ServedModels(base, served)


def _own_bytes(adapted: LanguageModel, base: LanguageModel) -> int:
    """Bytes of the tensors that a model does not share with its base."""
    shared = {tensor.data_ptr() for tensor in base.state_dict().values()}
    own = adapted.state_dict().values()
    return sum(tensor.nbytes for tensor in own if tensor.data_ptr() not in shared)
