"""A model ready to answer: weights, tokenizer and engine from one directory."""

from pathlib import Path
from typing import NamedTuple

import torch

from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.frontend import Frontend
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.parallel.devices import resolve_device
from nemotron3.text import Tokenizer


class Loaded(NamedTuple):
    """What `LLM` and `AsyncLLM` are made of."""

    engine: Engine
    frontend: Frontend


def load(
    model: str | Path | LanguageModel,
    tokenizer: Tokenizer | None,
    *,
    config: EngineConfig | None,
    device: str,
    dtype: torch.dtype | None,
) -> Loaded:
    """Load a directory, or take a model and its tokenizer as they are."""
    name = "model"
    if not isinstance(model, LanguageModel):
        path = Path(model)
        name = path.resolve().name
        tokenizer = tokenizer or Tokenizer.from_directory(path)
        model = LanguageModel.from_pretrained(path, device=resolve_device(device), dtype=dtype)
    if tokenizer is None:
        raise ConfigError("a model in memory comes without a tokenizer; give tokenizer=...")
    vocab_size = model.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries and the model {vocab_size}; they "
            "do not belong together"
        )
    eos_ids = frozenset({*tokenizer.stop_ids, model.config.eos_token_id})
    engine = Engine(model, config, stop_ids=eos_ids)
    frontend = Frontend(tokenizer, vocab_size=vocab_size, eos_ids=eos_ids, name=name)
    return Loaded(engine, frontend)
