"""The base of `LLM` and `AsyncLLM`: model, tokenizer and engine, from a directory or in memory."""

from dataclasses import replace
from pathlib import Path

import torch

from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.frontend import Frontend
from nemotron3.inference.generation_config import Source, generation_defaults
from nemotron3.inference.output_processor import Prompt
from nemotron3.inference.requests import SamplingParams
from nemotron3.models.huggingface import stored_weight_format
from nemotron3.models.lora import merge_adapter, read_adapter, shared_model
from nemotron3.models.lora.peft import companions_with_adapter
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import convert_weights
from nemotron3.ops.weights import WeightFormat
from nemotron3.runtime.devices import resolve_device
from nemotron3.text import ChatTemplate, Tokenizer


def name_of(path: Path) -> str:
    """A model's name: that of its directory, or of the run if the directory is `RUN/model`."""
    resolved = path.resolve()
    if resolved.name == "model" and resolved.parent.name:
        return resolved.parent.name
    return resolved.name


def load_model(
    path: Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    weights: WeightFormat | None = None,
    lora: str | Path | None = None,
) -> LanguageModel:
    """The model in a directory, with an adapter merged before its weights are quantized.

    Weights that are stored quantized stay so, and an adapter stands beside them. On the CPU their
    directory is mapped, and computes in float32, unless a `dtype` is given. Plain weights are
    copied into large pages, which are read faster.
    """
    place = resolve_device(device)
    is_quantized = stored_weight_format(path) is not None
    if lora is not None and not is_quantized:
        model = LanguageModel.from_pretrained(path, device=place, dtype=dtype)
        merge_adapter(model, read_adapter(lora, model))
        if weights is not None:
            model = convert_weights(model, weights)
        _take_companions(model, lora)
        return model
    if is_quantized and place.type == "cpu" and dtype is None:
        model = LanguageModel.from_pretrained(path, weights=weights, mapped=True)
    else:
        model = LanguageModel.from_pretrained(path, device=place, dtype=dtype, weights=weights)
    return model if lora is None else with_adapter(model, lora)


def with_adapter(model: LanguageModel, lora: str | Path) -> LanguageModel:
    """A model with an adapter, which shares with `model` all tensors that the adapter leaves."""
    adapted = shared_model(model, read_adapter(lora, model))
    _take_companions(adapted, lora)
    return adapted


def tokenizer_directory(path: Path, lora: str | Path | None) -> Path:
    """Where the tokenizer is read from: the adapter's directory, if it has one."""
    own = None if lora is None else Path(lora)
    return own if own is not None and (own / "tokenizer.json").is_file() else path


def _take_companions(model: LanguageModel, lora: str | Path) -> None:
    if model.companions is not None:
        model.companions = companions_with_adapter(model.companions, lora)


class BaseLLM:
    """Engine and frontend of one model: the base of `LLM` and `AsyncLLM`."""

    def __init__(
        self,
        model: str | Path | LanguageModel,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        weights: WeightFormat | None = None,
        generation_config: Source = "auto",
        lora: str | Path | None = None,
    ) -> None:
        """`model` is a directory in the published layout, or a model in memory.

        A model in memory is used in place. It may be in training: sampling does not change it, and
        after its weights have changed `invalidate_caches` must be called. Text needs a `tokenizer`;
        without one, prompts and answers are token ids. `device`, `dtype` and `weights` apply to a
        directory; `weights` is the number format of the matrices (`LanguageModel.from_pretrained`).

        With `generation_config` "auto" the sampling defaults of the model's directory are used,
        with "none" they are not.

        `lora` is the directory of an adapter in PEFT's layout. It is merged when it is read, or
        stands beside weights that are quantized; a model in memory stays as it is, and its
        unchanged tensors are shared. The adapter's
        tokenizer and generation_config.json, where it has them, take the place of the model's.
        """
        if isinstance(model, LanguageModel):
            name = "model"
            if lora is not None:
                model = with_adapter(model, lora)
        else:
            path = Path(model)
            name = name_of(path)
            tokenizer = tokenizer or Tokenizer.from_directory(tokenizer_directory(path, lora))
            model = load_model(path, device=device, dtype=dtype, weights=weights, lora=lora)
        vocab_size = model.config.vocab_size
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} entries and the model {vocab_size}; "
                "they do not belong together"
            )
        defaults = generation_defaults(
            model.companions, source=generation_config, vocab_size=vocab_size
        )
        self.defaults = defaults
        """Sampling defaults of the model's directory."""
        stop_ids = () if tokenizer is None else tokenizer.stop_ids
        eos_ids = defaults.eos_ids | {*stop_ids} | model.config.eos_token_ids
        self._engine = Engine(model, config, stop_ids=eos_ids)
        self._frontend = Frontend(tokenizer, vocab_size=vocab_size, eos_ids=eos_ids, name=name)

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling parameters of a request that sets none."""
        return SamplingParams(**self.defaults.sampling, max_tokens=self.defaults.max_tokens)

    def with_default_length(self, prompt: Prompt, params: SamplingParams) -> SamplingParams:
        """`params` with the default `max_tokens` of the model's directory, if they have none.

        A default that exceeds the rest of the context is not an error: the answer ends there.
        """
        most = self.defaults.max_tokens
        if most is None or params.max_tokens is not None:
            return params
        most = max(most, params.min_tokens)
        room = self.max_model_len - len(prompt.ids)
        return params if most >= room else replace(params, max_tokens=most)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises ConfigError if none was given."""
        return self._frontend.tokenizer

    @property
    def template(self) -> ChatTemplate:
        """The model's chat template."""
        return self._frontend.template

    @property
    def model_name(self) -> str:
        """The name of the model's directory or run."""
        return self._frontend.model_name

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.max_model_len

    @property
    def returns_routed_experts(self) -> bool:
        """Whether answers have the experts that were chosen for their tokens."""
        return self._engine.config.return_routed_experts
