"""A model ready to answer: weights, tokenizer and engine from one directory."""

from pathlib import Path

import torch

from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.frontend import Frontend
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.parallel.devices import resolve_device
from nemotron3.text import ChatTemplate, Tokenizer


class LoadedModel:
    """Engine and front of one model: what `LLM` and `AsyncLLM` are made of."""

    def __init__(
        self,
        model: str | Path | LanguageModel,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        """`model` is a directory in the published layout, or a model together with a tokenizer."""
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
                f"the tokenizer has {tokenizer.vocab_size} entries and the model {vocab_size}; "
                "they do not belong together"
            )
        eos_ids = frozenset({*tokenizer.stop_ids, model.config.eos_token_id})
        self._engine = Engine(model, config, stop_ids=eos_ids)
        self._frontend = Frontend(tokenizer, vocab_size=vocab_size, eos_ids=eos_ids, name=name)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._frontend.tokenizer

    @property
    def template(self) -> ChatTemplate:
        """How conversations are written for the model."""
        return self._frontend.template

    @property
    def model_name(self) -> str:
        """The directory's name."""
        return self._frontend.model_name

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.max_model_len
