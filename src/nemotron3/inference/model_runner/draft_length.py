"""The number of drafts of a step, chosen from measured acceptance and measured cost.

A step with d drafts yields 1 + a_1 + a_1 a_2 + … tokens, where a_i is the rate at which draft i is
accepted if those before it are. Its cost depends on the device and the batch: on a GPU it is about
that of a step without drafts for a small batch, and almost d times as much for a large one. Both
are measured while the engine runs, and the number with the most tokens per second is chosen. The
choice changes no token, only the speed.

A kind of step is a batch size with a number of drafts. The first step after one of another kind is
not measured, since its data are not in the processor's caches; nor are the first two steps of a new
kind, which compile and record. From time to time a neighbouring number is tried for a few steps, in
case it has become faster; the interval doubles while the trials find nothing better.
"""

from collections.abc import Iterable
from itertools import accumulate
from operator import mul

_FORGET = 0.05
"""Weight of a new observation in the average of acceptance."""
_RECENT, _TRIED = 0.2, 0.5
"""Weights of a new time in its average: for the number in use, and for one that is tried."""
_OUTLIER = 1.5
"""A time is clipped at this multiple of the average: longer steps were delayed from outside."""
_UNCOUNTED = 2
"""Number of first steps of a new kind that are not measured."""
_TRIAL = 4
"""Number of steps of a trial."""
_SOON, _LATE = 32, 512
"""Steps between trials: at first, and at most."""


class DraftLength:
    """Chooses the number of drafts for batches of each size."""

    def __init__(self, most: int, *, adapts: bool) -> None:
        self.most = most
        self._adapts = adapts
        self._acceptance = [0.7] * most
        self.yields = self._expected()
        """Expected tokens of a step with 0, 1, … drafts."""
        self._seconds: dict[tuple[int, int], float] = {}
        self._last: tuple[int, int] | None = None
        self._in_a_row = 0
        self._best = most
        self._pause = self._until_trial = _SOON
        self._trial, self._trial_left = 0, 0
        self._side = 1

    def choose(self, rows: int) -> int:
        """The number of drafts for the next step of `rows` sequences."""
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
        """Record a step: its drafts, the accepted drafts of each of its sequences, its time."""
        if self.most == 0:
            return
        accepted = list(accepted)
        for place in range(count):
            tried = sum(a >= place for a in accepted)
            if tried:
                rate = sum(a > place for a in accepted) / tried
                weight = 1 - (1 - _FORGET) ** tried
                self._acceptance[place] += weight * (rate - self._acceptance[place])
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
        """Note that another call of the model has run since the last step."""
        self._last = None

    def _expected(self) -> list[float]:
        return list(accumulate(accumulate(self._acceptance, mul), initial=1.0))
