"""Continuations of some prompts by the finished model, for a person to read."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How prompts are continued: what a run's record holds of `SamplingParams`."""

    max_tokens: int = 120
    """Most tokens to write per prompt."""
    temperature: float = 0.7
    """Divides the logits; 0 takes the most probable token."""
    top_p: float = 0.95
    """Keep the most probable tokens that together reach this probability."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 for all."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a text, beside those of the model."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        self.params()

    def params(self) -> SamplingParams:
        """The same for the engine; raises ConfigError for what makes no sense."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop_token_ids=self.stop_token_ids,
            seed=self.seed,
        )


def write_samples(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], config: SampleConfig
) -> tuple[dict[str, str], ...]:
    """Each prompt and its continuation."""
    if not prompts:
        return ()
    longest = max(len(tokenizer.encode(prompt)) for prompt in prompts)
    limits = EngineConfig(
        max_num_seqs=len(prompts), max_model_len=longest + config.max_tokens, prefix_cache_bytes=0
    )
    outputs = LLM(model, tokenizer=tokenizer, config=limits).generate(prompts, config.params())
    return tuple(
        {"prompt": prompt, "text": output.outputs[0].text}
        for prompt, output in zip(prompts, outputs, strict=True)
    )
