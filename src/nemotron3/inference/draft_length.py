"""How many tokens to draft, from what drafts have brought and what steps have cost.

A step with d drafts yields 1 + a_1 + a_1 a_2 + … tokens, where a_i is how often draft i stands when
those before it do, and takes as long as it takes: on a GPU with a small batch about as long as one
without, on a busy one almost d times as much. Both are measured while the engine runs, and the
number with the most tokens per second is taken. The first step of a kind is not counted: it
compiles, or records what later ones repeat. Every so often a neighbour is tried, so that what was
slow once is not given up forever; the less often, the longer nothing has come of it. None of this
changes a token, only when it comes.
"""

from collections.abc import Iterable

_FORGET = 0.05
"""Weight of a new observation."""
_RECENT, _TRIED = 0.2, 0.5
"""Weights of a new time: one among many, and one of a number that is only tried now and then."""
_SOON, _LATE = 32, 256
"""Steps between two that try another number: at first, and when none has been better for long."""


class DraftLength:
    """Chooses the number of drafts for batches of each size."""

    def __init__(self, most: int, *, adapts: bool) -> None:
        self.most = most
        self._adapts = adapts
        self._stands = [0.7] * most
        self._seconds: dict[tuple[int, int], float] = {}
        self._begun: set[tuple[int, int]] = set()
        self._best = most
        self._pause = self._left = _SOON
        self._side = 1

    def choose(self, rows: int) -> int:
        """The number of drafts for the next step of so many sequences."""
        if not self._adapts or self.most == 0:
            return self.most
        bucket = rows.bit_length()
        for count in range(self.most, -1, -1):
            if (bucket, count) not in self._seconds:
                return count
        best = max(range(self.most + 1), key=lambda d: self.yields(d) / self._seconds[bucket, d])
        if best != self._best:
            self._best, self._pause = best, _SOON
            self._left = min(self._left, self._pause)
        self._left -= 1
        if self._left > 0:
            return best
        self._pause = min(2 * self._pause, _LATE)
        self._left, self._side = self._pause, -self._side
        side = best + self._side
        return side if 0 <= side <= self.most else best - self._side

    def yields(self, count: int) -> float:
        """Tokens expected of a step with so many drafts."""
        total, all_stand = 1.0, 1.0
        for rate in self._stands[:count]:
            all_stand *= rate
            total += all_stand
        return total

    def record(self, count: int, accepted: Iterable[int], seconds: float) -> None:
        """Take what a step brought: the number of drafts that stood for each of its sequences."""
        accepted = list(accepted)
        for place in range(count):
            tried = sum(a >= place for a in accepted)
            if tried:
                rate = sum(a > place for a in accepted) / tried
                weight = 1 - (1 - _FORGET) ** tried
                self._stands[place] += weight * (rate - self._stands[place])
        key = (len(accepted).bit_length(), count)
        if key not in self._begun:
            self._begun.add(key)
            return
        before = self._seconds.get(key)
        weight = _RECENT if count == self._best else _TRIED
        self._seconds[key] = seconds if before is None else before + weight * (seconds - before)
