"""Logits processing by a request's parameters: bias, penalties, masks, minimum length.

The order is vLLM's: bias, repetition, frequency and presence penalty, then masks. A constraint has
priority over `min_tokens`: if a grammar allows only end tokens, the answer ends.
"""

from collections.abc import Iterable, Sequence
from math import inf

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.inference.requests import SamplingParams


class LogitRules:
    """The logits processing of one answer, with the token counts that it needs."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt: Sequence[int],
        stop_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        self._params = params
        masked = sorted(stop_ids) if params.min_tokens else []
        self._stop_ids = torch.tensor(masked, dtype=torch.int64)
        for name, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", stop_ids)):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise ConfigError(
                        f"has token {token}; the model's tokens are 0 to {vocab_size - 1}",
                        field=name,
                    )
        self._bias = None
        if params.logit_bias:
            self._bias = torch.zeros(vocab_size)
            for token, bias in params.logit_bias.items():
                self._bias[token] = bias
        self._counts = None
        if params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1:
            self._counts = torch.zeros(vocab_size)
        self._in_prompt = None
        if params.repetition_penalty != 1:
            self._in_prompt = torch.zeros(vocab_size, dtype=torch.bool)
            self._in_prompt[torch.tensor(prompt, dtype=torch.int64)] = True
        always = self._bias is not None or self._counts is not None
        self._applies_before = inf if always else params.min_tokens if masked else 0

    def apply_at(self, position: int) -> bool:
        """Whether the logits at this position of the answer are changed."""
        return position < self._applies_before

    def apply(
        self,
        row: Float[Tensor, " vocab"],
        *,
        position: int,
        drafts: Sequence[int],
        mask: Bool[Tensor, " vocab"] | None,
    ) -> Float[Tensor, " vocab"]:
        """The processed logits of the position after `drafts`, which `accept` has not counted.

        `mask` is True for the tokens that a constraint allows.
        """
        self._move_to(row.device)
        if self._bias is not None:
            row = row + self._bias
        if self._counts is not None:
            row = self._penalized(row, self._counts, drafts)
        if mask is not None:
            row = row.masked_fill(~mask.to(row.device), -torch.inf)
        if position < self._params.min_tokens and len(self._stop_ids):
            longer = row.index_fill(0, self._stop_ids, -torch.inf)
            if mask is None or bool((longer > -torch.inf).any()):
                row = longer
        return row

    def accept(self, token: int) -> None:
        """Count a token of the answer."""
        if self._counts is not None:
            self._counts[token] += 1

    def _penalized(self, row: Tensor, counts: Tensor, drafts: Iterable[int]) -> Tensor:
        params = self._params
        if drafts:
            counts = counts.clone()
            for token in drafts:
                counts[token] += 1
        if self._in_prompt is not None:
            penalty = params.repetition_penalty
            seen = self._in_prompt | (counts > 0)
            row = torch.where(seen, torch.where(row > 0, row / penalty, row * penalty), row)
        row = row - params.frequency_penalty * counts
        return row - params.presence_penalty * (counts > 0).float()

    def _move_to(self, device: torch.device) -> None:
        if self._stop_ids.device != device:
            self._stop_ids = self._stop_ids.to(device)
            self._in_prompt = self._in_prompt.to(device) if self._in_prompt is not None else None
            self._bias = self._bias.to(device) if self._bias is not None else None
            self._counts = self._counts.to(device) if self._counts is not None else None
