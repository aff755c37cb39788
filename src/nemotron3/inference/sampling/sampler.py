"""Choosing the next tokens, a window at a time, so that speculation changes nothing.

A step of the engine gives each answer 1 + d rows of logits: after its last token, and after each of
d drafted ones. For every row the token is worked out that plain decoding would choose there, given
the drafts before it; a draft stands while it is that token, and the first that is not gives way to
it. Nothing is accepted by chance: the noise belongs to the position (`noise.py`), so an answer has
the same tokens with and without drafts, whoever drafted. Drafts are drawn with the same noise from
the draft head's logits, which makes them coincide with the choice as often as the two distributions
allow (a maximal coupling would agree a little more often, and would make tokens depend on drafts).

    chooser = TokenChooser(params, prompt=ids, seed=7, index=0, stop_ids=stop_ids, vocab_size=V)
    choose([chooser], logits, [[]])          # logits [1, V]: [[token]]
    choose([chooser], logits, [[4, 8]])      # logits [3, V]: [[4, 9]] where 8 was not the choice
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
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
from nemotron3.ops.sampling.noise import position_key

COLDEST = 1e-5
"""Temperatures below this take the most probable token: dividing by them would overflow."""


class TokenChooser:
    """What one answer needs to choose its tokens, and what it has chosen so far.

    `seed` and `index` (which of the n answers) fix the noise. `stop_ids` end the answer; they are
    kept back before `min_tokens`, and nothing of a window is accepted after one. `constraint` and
    `budget` belong to this chooser, which reports every accepted token to them.
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
        """Why the last choice failed, where it did: the answer cannot go on."""
        self.failure: FailureKind | None = None
        self._seed, self._index = seed, index
        self._here = _Followed(budget, constraint)
        self._ahead: list[tuple[int, _Followed]] = []  # after each of the last drafts
        self._rules = LogitRules(params, prompt=prompt, stop_ids=stop_ids, vocab_size=vocab_size)

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the most probable token."""
        return self.params.temperature < COLDEST

    @property
    def is_plain(self) -> bool:
        """Whether every token from here on is the argmax of the model's logits."""
        return (
            self.is_greedy
            and not self._here.is_anything
            and not self._rules.apply_at(self.num_tokens)
        )

    @property
    def budget(self) -> ThinkingBudget | None:
        """The budget as it stands after the tokens chosen."""
        return self._here.budget

    def accept(self, token: int) -> None:
        """Take a token of the answer; `choose` does it for those it returns."""
        self.num_tokens += 1
        self._rules.accept(token)
        if self._ahead and self._ahead[0][0] == token:
            self._here = self._ahead.pop(0)[1]
        else:
            self._ahead = []
            self._here.accept(token)

    def rows(self, drafts: Sequence[int], logits: Float[Tensor, "rows vocab"]) -> "list[_Row]":
        """How to decide the rows after 0, 1, … drafts, of which `logits` holds the last ones.

        They end early behind a draft that cannot be chosen: no later row matters then.
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

    def _after(self, drafts: Sequence[int]) -> "_Followed":
        """What is followed, after drafts of which all but the last have been looked at."""
        if not drafts or not self._here.is_anything:
            return self._here
        ahead = len(drafts) - 1
        if ahead >= len(self._ahead) or self._ahead[ahead][0] != drafts[-1]:
            del self._ahead[ahead:]
            followed = (self._ahead[-1][1] if self._ahead else self._here).fork()
            followed.accept(drafts[-1])
            self._ahead.append((drafts[-1], followed))
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
            key=position_key(self._seed, self._index, position),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
        return _Row(changed=changed, draw=how)


@dataclass(frozen=True)
class _Followed:
    """What has to see every token, at one point of an answer."""

    budget: ThinkingBudget | None
    constraint: TokenConstraint | None

    @property
    def is_anything(self) -> bool:
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

    def fork(self) -> "_Followed":
        return _Followed(
            self.budget.fork() if self.budget is not None else None,
            self.constraint.fork() if self.constraint is not None else None,
        )


@dataclass(frozen=True, kw_only=True)
class _Row:
    """How one row is decided: forced, drawn, or by argmax; `changed` are its logits under rules."""

    changed: Tensor | None = None
    forced: int | None = None
    draw: Draw | None = None


def choose(
    choosers: Sequence[TokenChooser],
    logits: Float[Tensor, "rows vocab"],
    windows: Sequence[Sequence[int]],
) -> list[list[int]]:
    """The tokens accepted for each answer: the agreed beginning of its drafts, and one more.

    `logits` (float32) has the rows of the first window, then those of the second, and so on; a
    window is the drafts that the rows were computed after. A token of `stop_ids` is the last one.
    The choosers are advanced by what is returned. For an answer that cannot go on there is none and
    its chooser's `error` says why; the others are not concerned.
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
            rows |= zip(span, decided, strict=False)  # there may be fewer
        chosen = _decide(rows, logits)
    accepted: list[list[int]] = []
    for chooser, drafts, span in zip(choosers, windows, spans, strict=True):
        new_tokens = _agreed(chosen[span.start : span.stop], drafts, chooser.stop_ids)
        for token in new_tokens:
            chooser.accept(token)
        if not new_tokens and chooser.error is None:
            chooser.error = "the model's logits are no numbers, or leave no token to choose"
            chooser.failure = FailureKind.ENGINE
        accepted.append(new_tokens)
    return accepted


def draft(
    choosers: Sequence[TokenChooser],
    logits: Float[Tensor, "rows vocab"],
    windows: Sequence[Sequence[int]],
) -> list[int]:
    """One more draft for each answer, from a draft head's logits after the drafts so far.

    It is what `choose` would take if these were the model's logits, rules and noise included. The
    choosers stay where they are.
    """
    if all(chooser.is_plain for chooser in choosers):
        chosen = _most_probable(logits)
    else:
        rows: dict[int, _Row] = {}
        for i, (chooser, drafts) in enumerate(zip(choosers, windows, strict=True)):
            # No row is left behind a draft that cannot stand; what follows it cannot matter.
            rows[i] = next(iter(chooser.rows(drafts, logits[i : i + 1])), _Row())
        chosen = _decide(rows, logits)
    return [max(token, 0) for token in chosen]  # a bad draft is only a bad draft


def token_logprobs(
    logits: Float[Tensor, "rows vocab"], tokens: Sequence[int], top: int, *, weight_version: int = 0
) -> list[TokenLogprob]:
    """The log-probability of one token per row, its rank, and the `top` most probable ones.

    They are the model's own, so `logits` are those that it gave, before temperature and rules. The
    rank counts equals, as vLLM's does: of two most probable tokens both are second.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = _tokens((logprobs >= chosen).sum(-1))
    best = logprobs.topk(min(top, logprobs.shape[-1]))
    result: list[TokenLogprob] = []
    for row, token in enumerate(tokens):
        others = zip(_tokens(best.indices[row]), map(float, best.values[row]), strict=True)
        logprob = float(chosen[row])
        result.append(TokenLogprob(token, logprob, ranks[row], tuple(others), weight_version))
    return result


def _may_be(token: int, forced: int | None, mask: Tensor | None, stop_ids: frozenset[int]) -> bool:
    """Whether a draft can be accepted with more to come after it."""
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
    """The token of each row of the logits, -1 where there is none, or nothing to decide by."""
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
    """The logits of some rows, with those in place that rules have changed."""
    result = logits[torch.tensor(wanted, device=logits.device)]
    for place, i in enumerate(wanted):
        if (changed := rows[i].changed) is not None:
            result[place] = changed
    return result


def _most_probable(logits: Tensor) -> list[int]:
    best: Any = logits.max(-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    # NaN counts as the largest, and is above nothing.
    return [token if largest > -inf else -1 for token, largest in pairs]


def _tokens(ids: Any) -> list[int]:  # a Tensor, whose `tolist` does not say of what
    return ids.tolist()
