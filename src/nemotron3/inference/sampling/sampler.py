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
        self._here = _TokenStates(budget, constraint)
        self._ahead: list[tuple[int, _TokenStates]] = []  # after each of the last drafts
        self._rules = LogitRules(params, prompt=prompt, stop_ids=stop_ids, vocab_size=vocab_size)

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is chosen."""
        return self.params.temperature < COLDEST

    @property
    def is_plain(self) -> bool:
        """Whether every further token is the argmax of the model's logits."""
        return (
            self.is_greedy and not self._here.is_used and not self._rules.apply_at(self.num_tokens)
        )

    @property
    def budget(self) -> ThinkingBudget | None:
        """The reasoning budget after the tokens chosen so far."""
        return self._here.budget

    def accept(self, token: int) -> None:
        """Advance by a token of the answer; `choose` does so for the tokens that it returns."""
        self.num_tokens += 1
        self._rules.accept(token)
        if self._ahead and self._ahead[0][0] == token:
            self._here = self._ahead.pop(0)[1]
        else:
            self._ahead = []
            self._here.accept(token)

    def rows(self, drafts: Sequence[int], logits: Float[Tensor, "rows vocab"]) -> "list[_Row]":
        """How to choose the tokens after 0, 1, … drafts; `logits` has the last rows of these.

        The list ends early after a draft that cannot be chosen: no later row is needed then.
        """
        first = len(drafts) + 1 - logits.shape[0]
        rows: list[_Row] = []
        for ahead in range(len(drafts) + 1):
            here = self._after(drafts[:ahead])
            forced = here.forced()
            try:
                mask = here.mask() if forced is None else None
            except DataError as error:
                if ahead == 0:
                    self.error, self.failure = str(error), FailureKind.GRAMMAR
                break
            if ahead >= first:
                rows.append(self._row(logits[ahead - first], drafts[:ahead], forced, mask))
            if ahead == len(drafts) or not _may_be(drafts[ahead], forced, mask, self.stop_ids):
                break
        return rows

    def _after(self, drafts: Sequence[int]) -> "_TokenStates":
        """The states after drafts, where those after all but the last draft are computed."""
        if not drafts or not self._here.is_used:
            return self._here
        ahead = len(drafts) - 1
        if ahead >= len(self._ahead) or self._ahead[ahead][0] != drafts[-1]:
            del self._ahead[ahead:]
            states = (self._ahead[-1][1] if self._ahead else self._here).fork()
            states.accept(drafts[-1])
            self._ahead.append((drafts[-1], states))
        return self._ahead[ahead][1]

    def _row(
        self, logits: Tensor, drafts: Sequence[int], forced: int | None, mask: Tensor | None
    ) -> "_Row":
        if forced is not None:
            return _Row(forced=forced)
        position = self.num_tokens + len(drafts)
        changed = None
        if mask is not None or self._rules.apply_at(position):
            changed = self._rules.apply(logits, position=position, drafts=drafts, mask=mask)
        if self.is_greedy:
            return _Row(changed=changed)
        params = self.params
        how = Draw(
            key=key_in_stream(self._stream, position),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
        return _Row(changed=changed, draw=how)


@dataclass(frozen=True)
class _TokenStates:
    """The state machines that every token of an answer advances, at one position."""

    budget: ThinkingBudget | None
    constraint: TokenConstraint | None

    @property
    def is_used(self) -> bool:
        return self.budget is not None or self.constraint is not None

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


@dataclass(frozen=True, kw_only=True)
class _Row:
    """How the token of one row is chosen: forced, sampled, or by argmax.

    `changed` are the row's logits after penalties and masks, if there are any.
    """

    changed: Tensor | None = None
    forced: int | None = None
    draw: Draw | None = None


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
    spans = [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    if all(chooser.is_plain for chooser in choosers):
        chosen = _most_probable(logits)
    else:
        rows: dict[int, _Row] = {}
        for chooser, drafts, span in zip(choosers, windows, spans, strict=True):
            decided = chooser.rows(drafts, logits[span.start : span.stop])
            rows |= zip(span, decided, strict=False)  # `rows` may return fewer
        chosen = _decide(rows, logits)
    accepted: list[list[int]] = []
    for chooser, drafts, span in zip(choosers, windows, spans, strict=True):
        new_tokens = _agreed(chosen[span.start : span.stop], drafts, chooser.stop_ids)
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
    if all(chooser.is_plain for chooser in choosers):
        chosen = _most_probable(logits)
    else:
        rows: dict[int, _Row] = {}
        for i, (chooser, drafts) in enumerate(zip(choosers, windows, strict=True)):
            # There is no row after a draft that cannot be accepted; any draft will do there.
            rows[i] = next(iter(chooser.rows(drafts, logits[i : i + 1])), _Row())
        chosen = _decide(rows, logits)
    return [max(token, 0) for token in chosen]  # if no token can be chosen, any draft will do


def token_logprobs(
    logits: Float[Tensor, "rows vocab"], tokens: Sequence[int], top: int, *, weight_version: int = 0
) -> list[TokenLogprob]:
    """The log-probability and rank of one token per row, and the `top` most probable tokens.

    They are the model's own: `logits` are those before temperature, penalties and masks. The rank
    counts ties, as vLLM's does: two most probable tokens both have rank 2.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = _tokens((logprobs >= chosen).sum(-1))
    scores = _numbers(chosen.squeeze(-1))
    others: Iterable[tuple[tuple[int, float], ...]] = repeat((), len(tokens))
    if top:
        best: Any = logprobs.topk(min(top, logprobs.shape[-1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        others = (tuple(zip(ids, values, strict=True)) for ids, values in pairs)
    return [
        TokenLogprob(token, score, rank, alternatives, weight_version)
        for token, score, rank, alternatives in zip(tokens, scores, ranks, others, strict=True)
    ]


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


def _decide(rows: dict[int, _Row], logits: Tensor) -> list[int]:
    """The token of each row of the logits; -1 if none can be chosen or the row is not needed."""
    chosen = {i: row.forced for i, row in rows.items() if row.forced is not None}
    greedy = [i for i, row in rows.items() if row.forced is None and row.draw is None]
    if greedy:
        chosen |= zip(greedy, _most_probable(_gathered(rows, greedy, logits)), strict=True)
    drawn = {i: row.draw for i, row in rows.items() if row.draw is not None}
    if drawn:
        tokens = draw(_gathered(rows, list(drawn), logits), list(drawn.values()))
        chosen |= zip(drawn, _tokens(tokens), strict=True)
    return [chosen.get(i, -1) for i in range(logits.shape[0])]


def _gathered(rows: dict[int, _Row], wanted: Sequence[int], logits: Tensor) -> Tensor:
    """The logits of some rows, after penalties and masks."""
    result = logits[torch.tensor(wanted, device=logits.device)]
    for place, i in enumerate(wanted):
        if (changed := rows[i].changed) is not None:
            result[place] = changed
    return result


def _most_probable(logits: Tensor) -> list[int]:
    best: Any = logits.max(-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    # `max` returns NaN if there is one, and NaN is not above -inf.
    return [token if largest > -inf else -1 for token, largest in pairs]


def _numbers(values: Any) -> list[float]:
    return values.tolist()


def _tokens(ids: Any) -> list[int]:  # a Tensor, whose `tolist` has no element type
    return ids.tolist()
