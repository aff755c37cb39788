"""Scheduling: which sequences run or wait, the next chunk of each prompt, and preemption.

First come, first served. A sequence is admitted when a slot and the pages for all of its tokens are
free. Its prompt is then prefilled in chunks, and it decodes; pages for new tokens are allocated as
it grows. When no page is free, cached states are evicted first; then the sequence that arrived last
is preempted. It returns to the head of the queue and recomputes its state later, so none of its
tokens is lost.
"""

from bisect import insort
from collections import Counter, deque
from collections.abc import Iterable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine.prefix_cache import PrefixCache
from nemotron3.inference.sequences import Sequence
from nemotron3.models.cache.hybrid_cache import HybridCache, Snapshot
from nemotron3.models.layout import MAX_STEPS

_CLOSE = 8
"""A state is not cached within 1 / this of `prefix_interval` after another cached one."""


class _SharedPrompt(NamedTuple):
    """What every answer to a request begins with."""

    state: Snapshot
    end: Float[Tensor, " d_model"]
    """The hidden state after its last token, of which the first tokens are chosen."""


class Scheduler:
    """Owns the queues and the slots. It handles tokens and pages, and does not use the model."""

    def __init__(
        self,
        cache: HybridCache,
        prefixes: PrefixCache,
        config: EngineConfig,
        *,
        max_num_batched_tokens: int,
    ) -> None:
        self.cache = cache
        self.prefixes = prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival."""
        self.num_preemptions = 0
        self._config = config
        self.max_num_batched_tokens = max_num_batched_tokens
        self._is_narrow = config.state.is_narrow
        self._free_slots = list(range(len(cache.lengths)))[::-1]
        self._groups: dict[str, _SharedPrompt] = {}
        """For requests with several answers: the prompt, which one of them has read for all."""
        self._num_open: Counter[str] = Counter()
        """Answers to each request that wait or run."""

    @property
    def decoding(self) -> list[Sequence]:
        """The running sequences whose prompts are prefilled."""
        return [sequence for sequence in self.running if sequence.is_prefilled]

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Append sequences to the queue."""
        sequences = list(sequences)
        self.waiting.extend(sequences)
        self._num_open.update(sequence.request_id for sequence in sequences)

    def admit(self) -> None:
        """Move sequences from the queue to a slot, while slots and pages are free."""
        reading = {id(other.request) for other in self.running if not other.is_prefilled}
        skipped: list[Sequence] = []
        try:
            while self.waiting and self._free_slots:
                sequence = self.waiting.popleft()
                skipped.append(sequence)
                if id(sequence.request) in reading and self._needs_leader(sequence):
                    continue
                if not self._allocate(sequence):
                    return
                skipped.pop()
                reading.add(id(sequence.request))
                insort(self.running, sequence, key=lambda running: running.order)
        finally:
            self.waiting.extendleft(reversed(skipped))

    def schedule_prefill(self) -> list[list[tuple[Sequence, int]]]:
        """The prompt chunks of this step: for each model call, sequences and numbers of tokens.

        Narrow states are rounded at the end of each chunk of a prompt, and after each token of an
        answer. A sequence's tokens must not depend on other sequences. Therefore its chunks end
        only at lengths that follow from its own prompt, and tokens that it generated before a
        preemption are recomputed in a call of their own, as decoding steps.
        """
        budget = self.max_num_batched_tokens
        prompts: list[tuple[Sequence, int]] = []
        again: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            if sequence.is_prefilled or budget == 0:
                continue
            count = self._next_chunk(sequence)
            if count > budget:
                if self._is_narrow:
                    break
                count = budget
            (again if self.is_recompute(sequence) else prompts).append((sequence, count))
            budget -= count
        return [*([prompts] if prompts else []), *([chunk] for chunk in again)]

    def is_recompute(self, sequence: Sequence) -> bool:
        """Whether the next chunk recomputes generated tokens whose states are narrow."""
        return self._is_narrow and self.cache.lengths[sequence.running_slot] >= sequence.num_prompt

    def after_chunk(self, sequence: Sequence) -> None:
        """Cache the state that a chunk ended with, if other prompts or answers may start there."""
        slot = sequence.running_slot
        length = self.cache.lengths[slot]
        if not sequence.is_stale and length in self._stops(sequence):
            self.prefixes.insert(sequence.tokens[:length], slot)

    def share_prompt(self, sequence: Sequence, end: Float[Tensor, " d_model"]) -> None:
        """Keep a prompt that has just been read for the other answers to the request.

        `end` is the hidden state after it.
        """
        if sequence.num_generated == 0 and not sequence.is_stale and self._needs_leader(sequence):
            state = self.cache.snapshot(sequence.running_slot)
            self._groups[sequence.request_id] = _SharedPrompt(state, end.clone())

    def make_room(self, sequence: Sequence, new_tokens: int) -> bool:
        """Allocate pages for more tokens of a running sequence; returns False if it is preempted.

        If no page is free, cached states are evicted, then the last running sequences preempted.
        """
        while sequence.slot is not None:
            missing = self.cache.missing_pages(sequence.slot, new_tokens)
            if missing == 0:  # the usual case
                return True
            if missing <= self.cache.pool.num_free:
                self.cache.reserve(sequence.slot, new_tokens)
                return True
            if not self._evict():
                self._preempt(self.running[-1])
        return False

    def remove(self, sequence: Sequence, *, keep_state: bool = False) -> None:
        """Remove a finished or aborted sequence, running or waiting, and free its slot.

        With `keep_state` its state goes into the prefix cache.
        """
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        slot = sequence.slot
        if slot is not None:
            length = self.cache.lengths[slot]
            keep_state = keep_state and sequence.request.may_be_continued
            if keep_state and not sequence.is_stale and length <= len(sequence.tokens):
                self.prefixes.insert(sequence.tokens[:length], slot)
            self._release(sequence)
        self._num_open[sequence.request_id] -= 1
        if not self._num_open[sequence.request_id]:
            del self._num_open[sequence.request_id]
            shared = self._groups.pop(sequence.request_id, None)
            if shared is not None:
                self.cache.drop(shared.state)

    def drop_cached_states(self) -> None:
        """Drop all shared states and mark running ones as stale, because the weights changed."""
        self.reset_prefix_cache()
        for sequence in self.running:
            sequence.is_stale = True

    def reset_prefix_cache(self) -> None:
        """Drop all shared states."""
        self.prefixes.clear()
        while self._evict():
            pass

    def preempt_all(self) -> None:
        """Preempt all running sequences: they recompute their states."""
        for sequence in reversed(list(self.running)):
            self._preempt(sequence)

    def _evict(self) -> bool:
        """Drop one cached or shared state; returns whether there was one.

        Answers that wait for a dropped prompt prefill it themselves.
        """
        if self.prefixes.evict():
            return True
        if not self._groups:
            return False
        _, shared = self._groups.popitem()
        self.cache.drop(shared.state)
        return True

    def _allocate(self, sequence: Sequence) -> bool:
        """Allocate a slot, and pages for all tokens and one more; False if too few are free."""
        slot = self._free_slots.pop()
        shared, snapshot = None, None
        if self._config.keeps_states and not sequence.wants_prompt_logprobs:
            shared = self._groups.get(sequence.request_id)
            snapshot = shared.state if shared else self.prefixes.match(sequence.tokens)
        if snapshot is not None:
            self.cache.restore(slot, snapshot)
        sequence.begin(slot, self.cache.lengths[slot])
        if shared is not None and not sequence.num_generated:
            sequence.prompt_end = shared.end
        rest = len(sequence.tokens) + 1 - self.cache.lengths[slot]
        while self.cache.missing_pages(slot, rest) > self.cache.pool.num_free:
            if not self._evict():
                self._release(sequence)
                return False
        self.cache.reserve(slot, rest)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        slot = sequence.running_slot
        self.cache.free(slot)
        self._free_slots.append(slot)
        sequence.slot, sequence.is_prefilled, sequence.prompt_end = None, False, None
        sequence.drafts.clear()

    def _shares_prompt(self, sequence: Sequence) -> bool:
        """Whether one answer reads the prompt for all answers to the request."""
        params = sequence.request.params
        if params.prompt_logprobs is not None:  # each answer computes those of the whole prompt
            return False
        return params.n > 1 and self._config.keeps_states

    def _needs_leader(self, sequence: Sequence) -> bool:
        """Whether a sequence waits while another answer to its request reads the prompt."""
        return self._shares_prompt(sequence) and sequence.request_id not in self._groups

    def _next_chunk(self, sequence: Sequence) -> int:
        """Number of tokens up to the next length at which a chunk must end."""
        start, config = self.cache.lengths[sequence.running_slot], self._config
        ends = {len(sequence.tokens), *self._stops(sequence)}
        if self._is_narrow:
            grids = (self.max_num_batched_tokens, config.prefix_interval)
            ends |= {sequence.num_prompt, *((start // grid + 1) * grid for grid in grids)}
            if start >= sequence.num_prompt:
                ends.add(start + MAX_STEPS)
        return min(end for end in ends if end > start) - start

    def _stops(self, sequence: Sequence) -> set[int]:
        """Lengths at which the state is cached.

        A length shortly after another one is left out: it would save later prompts a few tokens and
        cost this prompt a model call.
        """
        if self._config.prefix_cache_bytes == 0 or not sequence.request.may_be_continued:
            return set()
        interval, length = self._config.prefix_interval, len(sequence.tokens)
        ends = {end for end in sequence.request.boundaries if 0 < end < length}
        kept = {*ends, sequence.num_cached_tokens} - {0}
        grid = range(interval, length, interval)
        close = interval // _CLOSE
        return {*ends, *(at for at in grid if not any(0 < at - k < close for k in kept))}
