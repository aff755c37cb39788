"""Sampling defaults from the `generation_config.json` of a model directory.

The publisher's recommended sampling parameters are in this file. As in vLLM, they are defaults for
parameters that a request omits; `max_new_tokens` is the default of `max_tokens`. `do_sample` and
the parameters of beam search are ignored. The end tokens are used even if the defaults are turned
off, because they are a property of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from nemotron3.errors import ConfigError
from nemotron3.inference.requests import SamplingParams
from nemotron3.models.huggingface import Companions

Source = Literal["auto", "none"]
"""The source of the defaults: the model's directory, or none."""

_FILE = "generation_config.json"
_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Keys of the file, and the fields of `SamplingParams`."""
_WHOLE = ("top_k", "max_new_tokens")
_REMEDY = "correct the file, or turn its defaults off by generation_config='none'"


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """The sampling defaults of a model."""

    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of `SamplingParams`, without `max_tokens`."""
    max_tokens: int | None = None
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end an answer, besides those of tokenizer and configuration."""

    def described(self) -> str:
        """The defaults in a line of text; empty if there are none."""
        length = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return ", ".join(f"{name} {value}" for name, value in {**self.sampling, **length}.items())


def generation_defaults(
    companions: Companions | None, *, source: Source = "auto", vocab_size: int
) -> GenerationDefaults:
    """The defaults of a loaded model's directory; raises ConfigError for a wrong value."""
    if source not in ("auto", "none"):
        raise ConfigError(f"is {source!r}; it must be 'auto' or 'none'", field="generation_config")
    if companions is None or companions.generation_config is None:
        return GenerationDefaults()
    path, values = companions.path / _FILE, companions.generation_config
    sampling: dict[str, Any] = {}
    if source == "auto":
        for key, name in _PARAMETERS.items():
            if values.get(key) is not None:
                sampling[name] = _checked(path, key, values[key])
    return GenerationDefaults(
        max_tokens=sampling.pop("max_tokens", None),
        sampling=sampling,
        eos_ids=_eos_ids(path, values.get("eos_token_id"), vocab_size),
    )


def _checked(path: Path, key: str, value: Any) -> Any:
    allowed = int if key in _WHOLE else int | float
    if isinstance(value, bool) or not isinstance(value, allowed):
        kind = "a whole number" if key in _WHOLE else "a number"
        raise ConfigError(f"{path}: {key} is {value!r}; it must be {kind}; {_REMEDY}")
    named: dict[str, Any] = {_PARAMETERS[key]: value}
    try:
        SamplingParams(**named)
    except ConfigError as error:
        bound = error.problem.partition("; ")[2]
        raise ConfigError(f"{path}: {key} is {value!r}; {bound}; {_REMEDY}") from error
    return value


def _eos_ids(path: Path, value: Any, vocab_size: int) -> frozenset[int]:
    ids = cast(list[Any], value) if isinstance(value, list) else [value]
    if value is None:
        return frozenset()
    for token in ids:
        is_id = isinstance(token, int) and not isinstance(token, bool)
        if not is_id or not 0 <= token < vocab_size:
            raise ConfigError(
                f"{path}: eos_token_id has {token!r}; it must be ids of this model's tokens, 0 to "
                f"{vocab_size - 1}; correct or remove it"
            )
    return frozenset(ids)
