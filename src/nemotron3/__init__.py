"""Nemotron 3 in one readable package.

The names people type stand here; they are loaded on first use, so that `import nemotron3` and
`nemotron3 --help` cost nothing.

    from nemotron3 import LanguageModel, ModelConfig
    model = LanguageModel.from_config(ModelConfig.preset("tiny"))
    logits = model(tokens)  # [batch, seq] -> [batch, seq, vocab]

    from nemotron3 import LLM, SamplingParams
    LLM("runs/tiny/model").generate("To be", SamplingParams(max_tokens=50))
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron3.inference.async_llm import AsyncLLM
    from nemotron3.inference.config import EngineConfig
    from nemotron3.inference.llm import LLM
    from nemotron3.inference.requests import SamplingParams
    from nemotron3.models.config import ModelConfig
    from nemotron3.models.nemotron_h import LanguageModel

    __version__: str

__all__ = [
    "LLM",
    "AsyncLLM",
    "EngineConfig",
    "LanguageModel",
    "ModelConfig",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "AsyncLLM": "nemotron3.inference.async_llm",
    "EngineConfig": "nemotron3.inference.config",
    "LLM": "nemotron3.inference.llm",
    "SamplingParams": "nemotron3.inference.requests",
    "LanguageModel": "nemotron3.models.nemotron_h",
    "ModelConfig": "nemotron3.models.config",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home module on first use (PEP 562)."""
    if name == "__version__":  # only an installed package has one; sources on a path run without
        return version("nemotron3")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
