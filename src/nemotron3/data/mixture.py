"""Blends and phases: the source of a training sample, as a function of the sample's number.

A blend gives every source a weight, and sample i comes from one of the sources. A random choice
would have the right proportions only in the long run, and the position in every source would be
state to save. Here the order is computed: at every step the count of each source is within one
sample of its target, and the number of samples from a source before sample i has a closed form.

The rule is Tijdeman's for the chairman assignment problem (Discrete Mathematics 32, 1980). With k
sources of weights w, step i and counts c so far, the sources with

    w_s (i + 1) - c_s >= 1 / (2k - 2)

may be chosen, and the one with the earliest deadline ((1 - 1 / (2k - 2)) + c_s) / w_s is chosen.
This keeps |c_s - w_s i| below 1 - 1 / (2k - 2) for all s and i; the simple rule of the largest
deficit has no such bound for three sources or more. Weights are converted to integer shares that
sum to at most 100,000, so the order repeats exactly after that sum. A table of one period is
enough, and decimal weights give short ones (0.7 and 0.3: ten entries).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nemotron3.errors import ConfigError

_SHARES = 100_000


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A stretch of training with one blend."""

    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each source, on any scale; if empty, the weights are the numbers of tokens."""

    until: float = 1.0
    """Where the phase ends, as a share of all training samples."""

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ConfigError(f"until = {self.until}: a phase ends in (0, 1]")
        _check_weights(self.weights)


@dataclass(frozen=True)
class Blend:
    """The order in which samples come from the sources, by their weights.

        blend = Blend({"english": 0.7, "code": 0.3})
        blend.source_and_index(np.arange(10))  # source, and index among its samples

    Sources are numbered in the order of `names`.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ConfigError("a blend needs at least one source")
        _check_weights(self.weights)

    @property
    def names(self) -> tuple[str, ...]:
        """The sources."""
        return tuple(self.weights)

    @cached_property
    def shares(self) -> NDArray[np.int64]:
        """The weights as integers without a common divisor; at least 1 for each source."""
        exact_shares = _whole_shares(list(self.weights.values()))
        if exact_shares is not None:
            return exact_shares
        total = sum(self.weights.values())
        exact = [weight / total * _SHARES for weight in self.weights.values()]
        shares = np.array([max(1, math.floor(share + 1e-6)) for share in exact], dtype=np.int64)
        # The shares left over by rounding down go to the sources that lost most.
        order = np.argsort(shares - np.array(exact), kind="stable")
        missing = _SHARES - int(shares.sum())
        if missing > 0:
            shares[order[:missing]] += 1
        return shares // np.gcd.reduce(shares)

    def source_and_index(
        self, samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each sample number: the number of its source, and its index among that source's."""
        order, before = self._period
        cycle, step = np.divmod(samples, len(order))
        source = order[step].astype(np.int64)
        return source, cycle * self.shares[source] + before[step]

    def counts(self, samples: int) -> NDArray[np.int64]:
        """How many of the first `samples` samples come from each source."""
        order, _ = self._period
        cycles, rest = divmod(samples, len(order))
        return cycles * self.shares + np.bincount(order[:rest], minlength=len(self.shares))

    @cached_property
    def _period(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The source of each step of a period, and how many of that source came before it."""
        shares = self.shares.tolist()
        length, num = sum(shares), len(shares)
        order = np.zeros(length, dtype=np.int32)
        if num > 1:
            # All integers: everything is multiplied by (2k - 2) and by the period.
            scale = 2 * num - 2
            counts = [0] * num
            for step in range(length):
                chosen, earliest = -1, math.inf
                for source, share in enumerate(shares):
                    count = counts[source]
                    if scale * (share * (step + 1) - count * length) >= length:
                        deadline = (scale - 1 + scale * count) / share
                        if deadline < earliest:
                            chosen, earliest = source, deadline
                counts[chosen] += 1
                order[step] = chosen
        before = np.zeros(length, dtype=np.int64)
        for source in range(num):
            places = np.flatnonzero(order == source)
            before[places] = np.arange(len(places))
        return order, before


@dataclass(frozen=True, kw_only=True)
class _Phase:
    start: int
    blend: Blend
    sources: NDArray[np.int64]
    """For each source of the blend, its number among the sources of the schedule."""
    consumed: NDArray[np.int64]
    """For each source of the schedule, the number of samples in the phases before."""


class PhaseSchedule:
    """A sequence of blends over `total_samples`; every source continues where it stopped.

    `names` are all sources in use, in order. A source that a phase leaves out keeps its position
    and continues from there in a later phase. Samples past the end belong to the last phase.
    """

    def __init__(
        self, phases: Sequence[tuple[Blend, float]], *, total_samples: int, names: Sequence[str]
    ) -> None:
        ends = [until for _, until in phases]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1.0:
            raise ConfigError(f"phases end at {ends}: the ends must rise, and the last one be 1.0")
        if total_samples <= 0:
            raise ConfigError(f"total_samples = {total_samples}: training needs samples")
        self.names = tuple(names)
        self.total_samples = total_samples
        self._phases: list[_Phase] = []
        start, consumed = 0, np.zeros(len(self.names), dtype=np.int64)
        for blend, until in phases:
            unknown = set(blend.names) - set(self.names)
            if unknown:
                raise ConfigError(
                    f"a blend names {', '.join(sorted(unknown))}; the corpus has "
                    f"{', '.join(self.names)}"
                )
            sources = np.array([self.names.index(name) for name in blend.names], dtype=np.int64)
            self._phases.append(
                _Phase(start=start, blend=blend, sources=sources, consumed=consumed)
            )
            end = round(until * total_samples)
            consumed = consumed.copy()
            consumed[sources] += blend.counts(end - start)
            start = end

    @classmethod
    def build(
        cls, phases: Sequence[PhaseConfig], *, total_samples: int, num_tokens: Mapping[str, int]
    ) -> "PhaseSchedule":
        """The schedule of configs, for sources with that many tokens."""
        blends = [
            (
                Blend(dict(phase.weights or {k: float(v) for k, v in num_tokens.items()})),
                phase.until,
            )
            for phase in phases
        ]
        return cls(blends, total_samples=total_samples, names=tuple(num_tokens))

    def source_and_index(
        self, samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each sample number: the number of its source, and its index among that source's."""
        starts = np.array([phase.start for phase in self._phases])
        which = np.searchsorted(starts, samples, side="right") - 1
        source, index = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(which):
            phase, mask = self._phases[number], which == number
            local, place = phase.blend.source_and_index(samples[mask] - phase.start)
            source[mask] = phase.sources[local]
            index[mask] = phase.consumed[source[mask]] + place
        return source, index

    def consumed(self, samples: int) -> dict[str, int]:
        """How many samples of each source the first `samples` samples hold."""
        phase = [phase for phase in self._phases if phase.start <= samples][-1]
        counts = phase.consumed.copy()
        counts[phase.sources] += phase.blend.counts(samples - phase.start)
        return {name: int(count) for name, count in zip(self.names, counts, strict=True)}


def _whole_shares(weights: Sequence[float]) -> NDArray[np.int64] | None:
    """The weights as small integers in exactly their ratio, or None if there are none."""
    fractions = [Fraction(weight).limit_denominator(_SHARES) for weight in weights]
    if not all(math.isclose(f, w, rel_tol=1e-14) for f, w in zip(fractions, weights, strict=True)):
        return None
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor > _SHARES:
        return None
    return np.array([share // divisor for share in whole], dtype=np.int64)


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"weight of {name} = {weight}: it must be positive; leave it out")
