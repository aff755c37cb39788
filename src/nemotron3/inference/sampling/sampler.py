"""Sampling the next tokens from a window of logits, with the same result as without drafts.

A step of the engine gives each answer 1 + d rows of logits: after its last token, and after each of
d drafts. For every row this module computes the token that decoding without drafts would choose
there, given the drafts before it. A draft is accepted if it equals that token; the first one that
does not is replaced by it. Acceptance has no randomness of its own: the noise of a position is a
function of seed, answer and position (`ops/sampling/noise.py`), so an answer has the same tokens
with any drafts or none. Drafts are sampled with the same noise from the MTP block's logits, so they
agree with the choice nearly as often as possible (a maximal coupling would agree a little more
often, and would make tokens depend on drafts: decision 0012).

    chooser = TokenChooser(params, prompt=ids, seed=7, index=0, stop_ids=stop_ids, vocab_size=V)
    choose([chooser], logits, [[]])          # logits [1, V]: [[token]]
    choose([chooser], logits, [[4, 8]])      # logits [3, V]: [[4, 9]] if 8 is rejected
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from math import inf
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.errors import DataError
from nemotron3.inference.requests import FailureKind, SamplingParams, TokenConstraint, TokenLogprob
from nemotron3.inference.sampling.candidates import Draw, draw
from nemotron3.inference.sampling.logit_rules import LogitRules
from nemotron3.inference.sampling.thinking_budget import ThinkingBudget
from nemotron3.ops.sampling import logprobs_and_ranks
from nemotron3.ops.sampling.noise import key_in_stream, stream_key

COLDEST = 1e-5
"""Below this temperature the most probable token is chosen: a division could overflow."""


class TokenChooser:
    """The sampling state of one answer: its parameters, and what depends on its tokens so far.

    `seed` and `index` (of the n answers) determine the noise. `stop_ids` end the answer: they are
    masked before `min_tokens`, and no draft is accepted after one. `constraint` and `budget` belong
    to this chooser, which reports every accepted token to them.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt: Sequence[int],
        seed: int,
        index: int,
        stop_ids: frozenset[int],
        vocab_size: int,
        constraint: TokenConstraint | None = None,
        budget: ThinkingBudget | None = None,
    ) -> None:
        self.params = params
        self.num_tokens = 0
        self.stop_ids = stop_ids
        self.error: str | None = None
        """Why no token could be chosen; None while the answer can continue."""
        self.failure: FailureKind | None = None
        self._stream = stream_key(seed, index)
        self._has_states = budget is not None or constraint is not None
        self._here = _TokenStates(budget, constraint)
        self._ahead: list[tuple[int, _TokenStates]] = []  # after each of the last drafts
        self._rules = LogitRules(params, prompt=prompt, stop_ids=stop_ids, vocab_size=vocab_size)
        self._is_greedy = params.temperature < COLDEST
        self._truncation = (params.temperature, params.top_k, params.top_p, params.min_p)

    @property
    def is_free(self) -> bool:
        """Whether every further token is chosen from the model's logits as they are."""
        return not self._has_states and not self._rules.apply_at(self.num_tokens)

    @property
    def budget(self) -> ThinkingBudget | None:
        """The reasoning budget after the tokens chosen so far."""
        return self._here.budget

    def accept(self, token: int) -> None:
        """Advance by a token of the answer; `choose` does so for the tokens that it returns."""
        self.num_tokens += 1
        self._rules.accept(token)
        if not self._has_states:
            return
        if self._ahead and self._ahead[0][0] == token:
            self._here = self._ahead.pop(0)[1]
        else:
            self._ahead = []
            self._here.accept(token)

    def decide(self, rows: "_Rows", at: int, drafts: Sequence[int], *, first: int = 0) -> None:
        """Say how the tokens after `first`, `first` + 1, … drafts are chosen, in rows from `at`.

        Rows are left out after a draft that cannot be chosen: they are not needed then.
        """
        if self.is_free:
            for ahead in range(first, len(drafts) + 1):
                self._choose_freely(rows, at + ahead - first, self.num_tokens + ahead)
            return
        for ahead in range(len(drafts) + 1):
            here = self._after(drafts[:ahead])
            forced = here.forced()
            try:
                mask = here.mask() if forced is None else None
            except DataError as error:
                if ahead == 0:
                    self.error, self.failure = str(error), FailureKind.GRAMMAR
                break
            if ahead >= first and forced is not None:
                rows.forced[at + ahead - first] = forced
            elif ahead >= first:
                self._change(rows, at + ahead - first, drafts[:ahead], mask)
            if ahead == len(drafts) or not _may_be(drafts[ahead], forced, mask, self.stop_ids):
                break

    def _after(self, drafts: Sequence[int]) -> "_TokenStates":
        """The states after drafts, where those after all but the last draft are computed."""
        if not drafts or not self._has_states:
            return self._here
        ahead = len(drafts) - 1
        if ahead >= len(self._ahead) or self._ahead[ahead][0] != drafts[-1]:
            del self._ahead[ahead:]
            states = (self._ahead[-1][1] if self._ahead else self._here).fork()
            states.accept(drafts[-1])
            self._ahead.append((drafts[-1], states))
        return self._ahead[ahead][1]

    def _change(self, rows: "_Rows", row: int, drafts: Sequence[int], mask: Tensor | None) -> None:
        position = self.num_tokens + len(drafts)
        if mask is not None or self._rules.apply_at(position):
            rows.changed[row] = self._rules.apply(
                rows.logits[row], position=position, drafts=drafts, mask=mask
            )
        self._choose_freely(rows, row, position)

    def _choose_freely(self, rows: "_Rows", row: int, position: int) -> None:
        if self._is_greedy:
            rows.greedy.append(row)
        else:
            rows.draws[row] = Draw(key_in_stream(self._stream, position), *self._truncation)


@dataclass(frozen=True)
class _TokenStates:
    """The state machines that every token of an answer advances, at one position."""

    budget: ThinkingBudget | None
    constraint: TokenConstraint | None

    def forced(self) -> int | None:
        return self.budget.forced() if self.budget is not None else None

    def mask(self) -> Tensor | None:
        return self.constraint.mask() if self.constraint is not None else None

    def accept(self, token: int) -> None:
        if self.budget is not None:
            self.budget.accept(token)
        if self.constraint is not None:
            self.constraint.accept(token)

    def fork(self) -> "_TokenStates":
        return _TokenStates(
            self.budget.fork() if self.budget is not None else None,
            self.constraint.fork() if self.constraint is not None else None,
        )


class _Rows:
    """How the token of each row of logits is chosen: forced, sampled, or by argmax."""

    def __init__(self, logits: Float[Tensor, "rows vocab"]) -> None:
        self.logits = logits
        self.forced: dict[int, int] = {}
        self.greedy: list[int] = []
        self.draws: dict[int, Draw] = {}
        self.changed: dict[int, Tensor] = {}
        """Rows of logits after penalties and masks."""

    def tokens(self) -> list[int]:
        """The token of each row; -1 if none can be chosen or the row is not needed."""
        chosen = [-1] * len(self.logits)
        for row, token in self.forced.items():
            chosen[row] = token
        if self.greedy:
            for row, token in zip(self.greedy, _most_probable(self._of(self.greedy)), strict=True):
                chosen[row] = token
        if self.draws:
            drawn = draw(self._of(list(self.draws)), list(self.draws.values()))
            for row, token in zip(self.draws, _tokens(drawn), strict=True):
                chosen[row] = token
        return chosen

    def _of(self, wanted: Sequence[int]) -> Tensor:
        """The logits of some rows, in ascending order, after penalties and masks."""
        if len(wanted) == len(self.logits) and not self.changed:
            return self.logits
        result = self.logits.index_select(0, torch.tensor(wanted, device=self.logits.device))
        for place, row in enumerate(wanted):
            if (changed := self.changed.get(row)) is not None:
                result[place] = changed
        return result


def choose(
    choosers: Sequence[TokenChooser],
    logits: Float[Tensor, "rows vocab"],
    windows: Sequence[Sequence[int]],
) -> list[list[int]]:
    """The new tokens of each answer: its accepted drafts, and one more.

    `logits` (float32) has the rows of the first window, then those of the second, and so on; a
    window is the drafts of an answer, and has a row before, between and after them. No token
    follows one of `stop_ids`. The choosers are advanced by the tokens that are returned. An answer
    that cannot continue gets no token, and its chooser's `error` says why; others are not affected.
    """
    sizes = [len(drafts) + 1 for drafts in windows]
    assert logits.shape[0] == sum(sizes), f"{logits.shape[0]} rows for windows of {sizes}"
    starts = [0, *accumulate(sizes)]
    rows = _Rows(logits)
    for chooser, drafts, start in zip(choosers, windows, starts, strict=False):
        chooser.decide(rows, start, drafts)
    chosen = rows.tokens()
    accepted: list[list[int]] = []
    for chooser, drafts, start in zip(choosers, windows, starts, strict=False):
        new_tokens = _agreed(chosen[start : start + len(drafts) + 1], drafts, chooser.stop_ids)
        for token in new_tokens:
            chooser.accept(token)
        if not new_tokens and chooser.error is None:
            chooser.error = "the model's logits are NaN, or leave no token to choose"
            chooser.failure = FailureKind.ENGINE
        accepted.append(new_tokens)
    return accepted


def draft(
    choosers: Sequence[TokenChooser],
    logits: Float[Tensor, "rows vocab"],
    windows: Sequence[Sequence[int]],
) -> list[int]:
    """One more draft for each answer, from the MTP block's logits after the drafts so far.

    It is the token that `choose` would return if these were the model's logits, with the same rules
    and noise. The choosers are not advanced.
    """
    rows = _Rows(logits)
    for row, (chooser, drafts) in enumerate(zip(choosers, windows, strict=True)):
        chooser.decide(rows, row, drafts, first=len(drafts))
    # No row may be needed, or no token possible, after a draft that cannot be accepted: then any
    # draft will do.
    return [max(token, 0) for token in rows.tokens()]


def token_logprobs(
    logits: Float[Tensor, "rows vocab"], tokens: Sequence[int], top: int, *, weight_version: int = 0
) -> list[TokenLogprob]:
    """The log-probability and rank of one token per row, and the `top` most probable tokens.

    They are the model's own: `logits` are those before temperature, penalties and masks. The rank
    counts ties, as vLLM's does: two most probable tokens both have rank 2.
    """
    logits = logits.float()
    logprobs, ranks = logprobs_and_ranks(logits, torch.tensor(tokens, device=logits.device))
    others: Iterable[tuple[tuple[int, float], ...]] = repeat((), len(tokens))
    if top:
        best: Any = logits.log_softmax(-1).topk(min(top, logits.shape[-1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        others = (tuple(zip(ids, values, strict=True)) for ids, values in pairs)
    scores = _numbers(logprobs), _tokens(ranks)
    fields = zip(tokens, *scores, others, repeat(weight_version), strict=False)
    return list(map(TokenLogprob._make, fields))


def _may_be(token: int, forced: int | None, mask: Tensor | None, stop_ids: frozenset[int]) -> bool:
    """Whether a draft can be accepted and followed by another token."""
    if forced is not None:
        return token == forced
    return token not in stop_ids and (mask is None or bool(mask[token]))


def _agreed(tokens: Sequence[int], drafts: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    new_tokens: list[int] = []
    for i, token in enumerate(tokens):
        if token < 0:
            break
        new_tokens.append(token)
        if token in stop_ids or i == len(drafts) or token != drafts[i]:
            break
    return new_tokens


def _most_probable(logits: Tensor) -> list[int]:
    best: Any = logits.max(-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    # `max` returns NaN if there is one, and NaN is not above -inf.
    return [token if largest > -inf else -1 for token, largest in pairs]


def _numbers(values: Any) -> list[float]:
    return values.tolist()


def _tokens(ids: Any) -> list[int]:  # a Tensor, whose `tolist` has no element type
    return ids.tolist()
