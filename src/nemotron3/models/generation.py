"""Writing text with a model, token by token, through its carried state.

The plain loop: one prefill of all prompts, packed, then one step per token for the sequences still
running. The engine for serving many requests is another matter; this one is to look at a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models.cache import HybridCache
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.steps import SteppingModel, StepRunner


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to choose the next token, and when to stop."""

    max_new_tokens: int = 128
    """Most tokens to write per prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_p: float = 1.0
    """Keep the most probable tokens that together reach this probability."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 for all."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence; they are not part of the result."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens}; ask for at least one token"
            )
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) to 100")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be 0 to 2^63 - 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")


@runtime_checkable
class CausalModel(SteppingModel, Protocol):
    """What generation needs of a model."""

    def next_logits(
        self, tokens: Tensor, *, layout: SequenceLayout, state: HybridCache
    ) -> Tensor: ...

    def new_state(self, slots: int) -> HybridCache: ...

    @property
    def device(self) -> torch.device: ...


@torch.inference_mode()
def generate(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt; returns the new tokens of each.

    `on_token(prompt_index, token)` is called as tokens come, for showing them.
    """
    if not prompts or any(not prompt for prompt in prompts):
        raise ConfigError(
            "every prompt needs at least one token; an empty prompt cannot be continued"
        )
    generator = torch.Generator(device="cpu").manual_seed(config.seed)
    state = model.new_state(slots=len(prompts))
    results: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    layout = state.layout([len(prompt) for prompt in prompts])
    stream = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
    logits = model.next_logits(stream, layout=layout, state=state)
    steps = StepRunner(model, state)
    for written in range(1, config.max_new_tokens + 1):
        chosen = sample(logits.float().cpu(), config, generator).tolist()
        still: list[tuple[int, int]] = []
        for index, token in zip(running, chosen, strict=True):
            if token in config.stop_token_ids:
                continue
            results[index].append(token)
            still.append((index, token))
            if on_token is not None:
                on_token(index, token)
        if not still or written == config.max_new_tokens:
            break
        running = [index for index, _ in still]
        logits = steps.run([[token] for _, token in still], running).logits[:, -1]
    return results


def sample(logits: Tensor, config: GenerationConfig, generator: torch.Generator) -> Tensor:
    """One token per row of `logits` [rows, vocab]."""
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = logits / config.temperature
    if config.top_k:
        kth = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if config.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        # A token stays while those before it have not yet reached top_p; the first always does.
        beyond = ordered.cumsum(-1) - ordered >= config.top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
