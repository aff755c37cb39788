"""How many tokens to draft, from what drafts have brought and what steps have cost.

A step with d drafts yields 1 + a_1 + a_1 a_2 + … tokens, where a_i is how often draft i stands when
those before it do, and takes as long as it takes: on a GPU with a small batch about as long as one
without, on a busy one almost d times as much. Both are measured while the engine runs, and the
number with the most tokens per second is taken. None of this changes a token, only when it comes.

The first step after one of another kind is not counted, since it finds nothing of what it needs in
a cache; of a new kind the first two are not, which compile and record what later ones repeat. Every
so often a neighbour is tried for some steps, so that what was slow once is not given up forever;
the less often, the longer nothing has come of it.
"""

from collections.abc import Iterable
from itertools import accumulate
from operator import mul

_FORGET = 0.05
"""Weight of a new observation of what stands."""
_RECENT, _TRIED = 0.2, 0.5
"""Weights of a new time: one among many, and one of a number that is only tried now and then."""
_OUTLIER = 1.5
"""Of the time so far: a step that took longer was held up by something else."""
_UNCOUNTED = 2
"""First steps of a new kind."""
_TRIAL = 4
"""Steps for which a neighbour is tried."""
_SOON, _LATE = 32, 512
"""Steps until the next trial: at first, and when none has found better for long."""


class DraftLength:
    """Chooses the number of drafts for batches of each size."""

    def __init__(self, most: int, *, adapts: bool) -> None:
        self.most = most
        self._adapts = adapts
        self._stands = [0.7] * most
        self.yields = self._expected()
        """Tokens expected of a step with 0, 1, … drafts."""
        self._seconds: dict[tuple[int, int], float] = {}
        self._last: tuple[int, int] | None = None
        self._in_a_row = 0
        self._best = most
        self._pause = self._until_trial = _SOON
        self._trial, self._trial_left = 0, 0
        self._side = 1

    def choose(self, rows: int) -> int:
        """The number of drafts for the next step of so many sequences."""
        if not self._adapts or self.most == 0:
            return self.most
        bucket = rows.bit_length()
        for count in range(self.most, -1, -1):
            if (bucket, count) not in self._seconds:
                return count
        seconds, yields = self._seconds, self.yields
        best = max(range(self.most + 1), key=lambda d: yields[d] / seconds[bucket, d])
        if best != self._best:
            self._best, self._pause, self._until_trial, self._trial_left = best, _SOON, _SOON, 0
        if self._trial_left:
            self._trial_left -= 1
            return self._trial
        self._until_trial -= 1
        if self._until_trial > 0:
            return best
        self._pause = min(2 * self._pause, _LATE)
        self._until_trial, self._trial_left, self._side = self._pause, _TRIAL - 1, -self._side
        aside = best + self._side
        self._trial = aside if 0 <= aside <= self.most else best - self._side
        return self._trial

    def record(self, count: int, accepted: Iterable[int], seconds: float) -> None:
        """Take what a step brought: the number of drafts that stood for each of its sequences."""
        if self.most == 0:
            return  # there is nothing to choose
        accepted = list(accepted)
        for place in range(count):
            tried = sum(a >= place for a in accepted)
            if tried:
                rate = sum(a > place for a in accepted) / tried
                weight = 1 - (1 - _FORGET) ** tried
                self._stands[place] += weight * (rate - self._stands[place])
        if count:
            self.yields = self._expected()
        key = (len(accepted).bit_length(), count)
        self._in_a_row = self._in_a_row + 1 if key == self._last else 1
        self._last = key
        before = self._seconds.get(key)
        if self._in_a_row <= (_UNCOUNTED if before is None else 1):
            return
        if before is not None:
            weight = _RECENT if count == self._best else _TRIED
            seconds = before + weight * (min(seconds, _OUTLIER * before) - before)
        self._seconds[key] = seconds

    def interrupted(self) -> None:
        """Something else has run since the last step."""
        self._last = None

    def _expected(self) -> list[float]:
        return list(accumulate(accumulate(self._stands, mul), initial=1.0))
