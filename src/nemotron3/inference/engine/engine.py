"""The engine: many requests at once through one model, a step at a time.

A step decodes one token, or verifies a window of drafts, for every sequence whose prompt is
prefilled; then it prefills the next chunks of the other prompts. Both are the forward pass that
trains, over packed sequences and a carried state. The tokens of a request do not depend on the
requests that share its steps.

    engine = Engine(model, EngineConfig())
    engine.add(EngineRequest(request_id="a", prompt=(1, 2, 3), params=SamplingParams()))
    while engine.has_work:
        for delta in engine.step(): ...

It handles token ids only (`llm.py` handles text) and is not thread-safe (see `async_llm.py`).
"""

import random
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine.auxiliary_outputs import (
    answer_logprobs,
    record_prompt_logprobs,
    record_routes,
)
from nemotron3.inference.engine.memory import batched_tokens, longest_sequence, num_pages
from nemotron3.inference.engine.prefix_cache import PrefixCache
from nemotron3.inference.engine.scheduler import Scheduler
from nemotron3.inference.engine.stats import EngineStats
from nemotron3.inference.model_runner import ModelRunner
from nemotron3.inference.model_runner.draft_length import DraftLength
from nemotron3.inference.model_runner.speculative import Drafter, most_drafts
from nemotron3.inference.model_runner.weights import (
    RunningRequests,
    Weights,
    assert_running,
    next_version,
    prepared_weights,
)
from nemotron3.inference.requests import FinishReason, TokenDelta, TokenLogprob
from nemotron3.inference.sampling.sampler import TokenChooser, choose
from nemotron3.inference.sequences import EngineRequest, Sequence
from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.models.layout import MAX_STEPS, SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import has_rounded_products
from nemotron3.models.rounded_activations import round_activations
from nemotron3.runtime.malloc import retain_freed_memory


class Engine:
    """Runs requests on a model."""

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig | None = None,
        *,
        stop_ids: frozenset[int] | None = None,
        make_runner: Callable[..., ModelRunner] = ModelRunner,
    ) -> None:
        """`stop_ids` end every answer; by default they are the model's end tokens. `make_runner`
        creates the model runner; it is called with the arguments of `ModelRunner`."""
        if has_rounded_products(model):
            raise ConfigError(
                "the model trains in NVFP4, where a token's result depends on the others of its "
                "batch; an engine needs the saved model, or another one of the same weights "
                "without rounded products: apply_precision(model, PrecisionConfig())"
            )
        if model.device.type == "cpu":
            retain_freed_memory()
        self.config = config or EngineConfig()
        model = round_activations(model, self.config.activations)
        self.model = model  # its training mode stays as it is: no module depends on it
        wanted = self.config.max_model_len or model.config.max_position_embeddings
        pages = num_pages(model, self.config, wanted)
        self.max_model_len = longest_sequence(self.config, wanted, pages)
        self.stop_ids = model.config.eos_token_ids if stop_ids is None else stop_ids
        drafts = most_drafts(model, self.config.max_draft_tokens)
        with torch.inference_mode():
            self.cache = HybridCache(
                model.config,
                slots=self.config.max_num_seqs,
                dtype=model.compute_dtype,
                device=model.device,
                page_size=self.config.page_size,
                pages=pages,
                max_length=self.max_model_len + MAX_STEPS,
                drafts=drafts > 0,
                precision=model.state_precision(self.config.state),
            )
        kept_bytes = self.config.prefix_cache_bytes if self.config.keeps_states else 0
        self.prefixes = PrefixCache(self.cache, max_bytes=kept_bytes)
        self.scheduler = Scheduler(
            self.cache,
            self.prefixes,
            self.config,
            max_num_batched_tokens=batched_tokens(self.config, model.device),
        )
        self._runner = make_runner(
            model, self.cache, returns_routes=self.config.return_routed_experts
        )
        self._drafter = Drafter(self._runner) if drafts else None
        self._draft_length = DraftLength(drafts, adapts=self.config.adapts_drafts)
        self._drafting_s = 0.0  # seconds of the last step after its tokens were chosen
        self._stats = EngineStats()
        self._seeds = random.Random(self.config.seed)
        self._requests: dict[str, list[Sequence]] = {}
        self._num_added = 0
        self.weight_version = 0
        """Version of the weights that the next step uses."""
        self._addresses = _addresses(model)
        self._is_half_written = False

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self._requests)

    def check(self, request: EngineRequest) -> None:
        """Raise ConfigError for a request that this engine can never answer."""
        length, params, vocab = len(request.prompt), request.params, self.model.config.vocab_size
        if length == 0:
            raise ConfigError("has no tokens; an empty prompt cannot be continued", field="prompt")
        if length >= self.max_model_len:
            raise ConfigError(
                f"has {length} tokens, and prompt and answer together may have "
                f"{self.max_model_len}; shorten it",
                field="prompt",
            )
        if params.max_tokens is not None and length + params.max_tokens > self.max_model_len:
            raise ConfigError(
                f"is {params.max_tokens} and the prompt has {length} tokens; together they may "
                f"have {self.max_model_len}",
                field="max_tokens",
            )
        named = {"prompt": request.prompt, "stop_token_ids": params.stop_token_ids,
                 "logit_bias": params.logit_bias}  # fmt: skip
        for name, tokens in named.items():
            wrong = [token for token in tokens if not 0 <= token < vocab]
            if wrong:
                raise ConfigError(f"has token {wrong[0]}; the vocabulary has {vocab}", field=name)

    def has_room(self, request: EngineRequest) -> bool:
        """Whether the queue has room for a request; an empty queue accepts any."""
        waiting = len(self.scheduler.waiting)
        return waiting == 0 or waiting + request.params.n <= self.config.max_num_waiting

    def add(self, request: EngineRequest) -> None:
        """Add a request to the queue. It does not limit the queue: call `has_room` first."""
        self.check(request)
        if request.request_id in self._requests:
            raise ConfigError(f"request {request.request_id!r} is being answered already")
        seed = request.params.seed
        seed = self._seeds.getrandbits(62) if seed is None else seed
        sequences = [self._sequence(request, index, seed) for index in range(request.params.n)]
        self._requests[request.request_id] = sequences
        self.scheduler.add(sequences)

    @torch.inference_mode()
    def abort(self, request_id: str) -> list[TokenDelta]:
        """Abort a request; returns a delta for each of its unfinished answers."""
        deltas: list[TokenDelta] = []
        for sequence in list(self._requests.get(request_id, ())):
            self._end(sequence, FinishReason.ABORT)
            deltas.append(
                TokenDelta(
                    request_id,
                    sequence.index,
                    tuple(sequence.unsent),
                    tuple(sequence.unsent_logprobs),
                    finish_reason=FinishReason.ABORT,
                    weight_version=sequence.unsent_version,
                    continues_old_states=sequence.unsent_is_stale,
                )
            )
        return deltas

    @torch.inference_mode()
    def step(self) -> list[TokenDelta]:
        """Execute one step; returns the new tokens, except those of requests that nobody streams:
        they come when an answer begins, when it ends, and when the weights have changed."""
        if self._is_half_written:
            raise CheckpointError(
                "the model's weights are half written: update_weights failed while it wrote; call "
                "it again with weights that can be read"
            )
        self.scheduler.admit()
        self._stats.steps += 1
        deltas: list[TokenDelta] = []
        decoding = self.scheduler.decoding
        if decoding:
            deltas += self._decode(decoding)
        begun = [each for each in self.scheduler.running if each.prompt_end is not None]
        if begun:
            deltas += self._begin(begun)
        for chunks in self.scheduler.schedule_prefill():
            deltas += self._prefill(chunks)
        return deltas

    def stats(self) -> EngineStats:
        """Counts so far; may be called from any thread."""
        scheduler = self.scheduler
        return replace(
            self._stats,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_usage=self.cache.table.num_held / max(len(self.cache.pool), 1),
            prefix_bytes=self.prefixes.nbytes,
            preemptions=scheduler.num_preemptions,
        )

    def update_weights(
        self,
        weights: Weights,
        *,
        version: int | None = None,
        running: RunningRequests = "recompute",
    ) -> int:
        """Write other weights into the model's tensors, between two steps; returns their version.

        `weights` are a model directory, or all tensors by the names of `model.state_dict()`; if
        they do not fit, an error is raised before anything is written. Running requests keep their
        tokens: with "recompute" their states are recomputed with the new weights, with "keep" they
        continue from the states of the old weights. No other result of the old weights is reused.
        """
        assert_running(running)
        version = next_version(self.weight_version, version)
        write = prepared_weights(self.model, weights)
        self._is_half_written = True
        write()
        self._is_half_written = False
        return self.invalidate_caches(version=version, running=running)

    @torch.inference_mode()
    def invalidate_caches(
        self, *, version: int | None = None, running: RunningRequests = "recompute"
    ) -> int:
        """Drop the states that other weights computed, after the caller has changed the weights.

        Tensors may have been written or replaced. Arguments and result are as in `update_weights`.
        """
        assert_running(running)
        self.weight_version = next_version(self.weight_version, version)
        if running == "recompute":
            self.scheduler.preempt_all()
        self.scheduler.drop_cached_states()
        addresses = _addresses(self.model)
        if addresses != self._addresses:  # graphs are valid for the memory that they recorded
            self._addresses = addresses
            self._runner.clear_graphs()
        return self.weight_version

    def reset_prefix_cache(self) -> None:
        """Drop the cached states of all prompts."""
        self.scheduler.reset_prefix_cache()

    def _sequence(self, request: EngineRequest, index: int, seed: int) -> Sequence:
        params = request.params
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.stop_ids
        self._num_added += 1
        room = self.max_model_len - len(request.prompt)
        return Sequence(
            request=request,
            index=index,
            chooser=TokenChooser(
                params,
                prompt=request.prompt,
                seed=seed,
                index=index,
                stop_ids=stop_ids,
                vocab_size=self.model.config.vocab_size,
                constraint=request.make_constraint(),
                budget=request.make_budget(),
            ),
            stop=request.make_stop(),
            tokens=list(request.prompt),
            order=self._num_added,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        )

    def _prefill(self, chunks: list[tuple[Sequence, int]]) -> list[TokenDelta]:
        for sequence, count in chunks:
            self.scheduler.make_room(sequence, count)
        chunks = [chunk for chunk in chunks if chunk[0].slot is not None]
        if not chunks:
            return []
        slots = [sequence.running_slot for sequence, _ in chunks]
        tokens = [self._next_tokens(sequence, count) for sequence, count in chunks]
        ends = list(accumulate(count for _, count in chunks))
        done = [
            (sequence, end - 1)
            for (sequence, count), slot, end in zip(chunks, slots, ends, strict=True)
            if self.cache.lengths[slot] + count == len(sequence.tokens)
        ]
        last = [at for _, at in done]
        is_prompt = not any(self.scheduler.is_recompute(sequence) for sequence, _ in chunks)
        wants_all = self._drafter is not None or self.config.return_routed_experts
        wants_all |= any(sequence.wants_prompt_logprobs for sequence, _ in chunks)
        self._draft_length.interrupted()
        hidden, routes = self._runner.prefill(
            tokens, slots, is_prompt=is_prompt, output_indices=None if wants_all else last
        )
        record_routes([s for s, _ in chunks], [count for _, count in chunks], routes)
        self._stats.prompt_tokens += ends[-1]
        if wants_all:
            self._process_prompts(chunks, hidden)
            hidden = hidden[torch.tensor(last, dtype=torch.int64, device=hidden.device)]
        for sequence, _ in chunks:
            self.scheduler.after_chunk(sequence)
        for (sequence, _), end in zip(done, hidden, strict=True):
            sequence.is_prefilled = True
            self.scheduler.share_prompt(sequence, end)
        if not done:
            return []
        hidden = hidden.unsqueeze(1)
        return self._choose([s for s, _ in done], hidden, self.model.logits(hidden))[0]

    def _begin(self, sequences: list[Sequence]) -> list[TokenDelta]:
        """Choose the first tokens of answers whose prompt another answer has read."""
        for sequence in sequences:
            self._stats.count_prefix(len(sequence.tokens), sequence.num_cached_tokens)
        hidden = torch.stack([each.take_prompt_end() for each in sequences]).unsqueeze(1)
        return self._choose(sequences, hidden, self.model.logits(hidden))[0]

    def _next_tokens(self, sequence: Sequence, count: int) -> list[int]:
        start = self.cache.lengths[sequence.running_slot]
        if start == sequence.num_cached_tokens and sequence.num_preemptions == 0:
            self._stats.count_prefix(len(sequence.tokens), start)
        return sequence.tokens[start : start + count]

    def _process_prompts(self, chunks: list[tuple[Sequence, int]], hidden: Tensor) -> None:
        """Prompt log-probabilities and the draft block, which need all hidden states of chunks."""
        at = 0
        for sequence, count in chunks:
            if sequence.wants_prompt_logprobs:
                record_prompt_logprobs(
                    self.model,
                    sequence,
                    hidden[at : at + count],
                    start=self.cache.lengths[sequence.running_slot] - count,
                    weight_version=self.weight_version,
                )
            at += count
        if self._drafter is not None:
            self._drafter.read(chunks, hidden)

    def _decode(self, sequences: list[Sequence]) -> list[TokenDelta]:
        count = min(len(sequence.drafts) for sequence in sequences)
        for sequence in sequences:
            self.scheduler.make_room(sequence, 1 + count)
        rows = [sequence for sequence in sequences if sequence.slot is not None]
        if not rows:
            return []
        start, drafting_s = time.perf_counter(), self._drafting_s
        for sequence in rows:
            del sequence.drafts[count:]
        tokens = [[sequence.tokens[-1], *sequence.drafts] for sequence in rows]
        slots = [sequence.running_slot for sequence in rows]
        out = self._runner.decode(tokens, slots, is_verification=count > 0)
        deltas, num_accepted = self._choose(
            rows, out.hidden, out.logits, verified=out.layout if count else None, routes=out.routes
        )
        # The drafts of this step were computed in the step before; their time counts for this one.
        seconds = time.perf_counter() - start - self._drafting_s + drafting_s
        self._draft_length.record(count, num_accepted, seconds)
        self._stats.draft_length = count
        return deltas

    def _choose(
        self,
        sequences: list[Sequence],
        hidden: Tensor,
        logits: Tensor,
        *,
        verified: SequenceLayout | None = None,
        routes: Many[Tensor] = (),
    ) -> tuple[list[TokenDelta], list[int]]:
        """Choose tokens for sequences from [rows, steps, ...] outputs, and draft the next ones.

        `verified` is the layout of a verification call. Returns the new tokens, and the number of
        accepted drafts of each sequence, including those after the end of an answer.
        """
        windows = [sequence.drafts for sequence in sequences]
        choosers = [sequence.chooser for sequence in sequences]
        accepted = choose(choosers, logits.flatten(0, 1).float(), windows)
        counts = [max(len(new_tokens), 1) for new_tokens in accepted]
        if verified is not None:
            self.cache.accept(verified, counts)
        experts = [r.flatten(0, 1) for r in routes]
        record_routes(sequences, counts, experts, window=hidden.shape[1])
        start = time.perf_counter()
        after, count = None, 0
        if self._drafter is not None:
            count = self._draft_length.choose(len(self.scheduler.decoding))
            if count:
                after = self._drafter.advance(sequences, accepted, hidden)
            else:
                self._drafter.defer(sequences, accepted, hidden)
        deltas: list[TokenDelta] = []
        num_accepted = [max(len(new_tokens) - 1, 0) for new_tokens in accepted]
        open_rows: list[int] = []
        scores = answer_logprobs(sequences, accepted, logits, weight_version=self.weight_version)
        for row, (sequence, new_tokens) in enumerate(zip(sequences, accepted, strict=True)):
            deltas += self._append(sequence, new_tokens, num_accepted[row], scores[row])
            if sequence.finish_reason is None:
                open_rows.append(row)
        if after is not None and open_rows:
            hidden, logits = after[0][open_rows], after[1][open_rows]
            self._draft([sequences[row] for row in open_rows], hidden, logits, count)
        self._drafting_s = time.perf_counter() - start
        return deltas, num_accepted

    def _draft(self, sequences: list[Sequence], hidden: Tensor, logits: Tensor, count: int) -> None:
        """Write `count` drafts for each sequence, as far as free pages suffice."""
        assert self._drafter is not None
        with_room: list[int] = []
        for row, sequence in enumerate(sequences):
            slot = sequence.running_slot
            if self.cache.missing_pages(slot, 1 + count) <= self.cache.pool.num_free:
                self.cache.reserve(slot, 1 + count)
                with_room.append(row)
        if with_room:
            chosen = [sequences[row] for row in with_room]
            self._drafter.write(chosen, hidden[with_room], logits[with_room], count)

    def _append(
        self,
        sequence: Sequence,
        new_tokens: Many[int],
        num_accepted: int,
        scores: Many[TokenLogprob],
    ) -> list[TokenDelta]:
        """Append tokens to an answer up to its end; the first `num_accepted` of them are drafts.

        Returns the deltas that are due: none while nobody reads the tokens of this answer.
        """
        request, chooser, stop = sequence.request, sequence.chooser, sequence.stop
        reason = FinishReason.ERROR if chooser.error is not None else None
        stop_token, taken = None, 0
        room = sequence.max_tokens - sequence.num_generated
        for token in new_tokens:
            taken += 1
            if token in chooser.stop_ids:
                reason, stop_token = FinishReason.STOP, token
            elif stop is not None and stop.ends_at(token):
                reason = FinishReason.STOP
            elif taken >= room:
                reason = FinishReason.LENGTH
            if reason is not None:
                break
        deltas: list[TokenDelta] = []
        if sequence.unsent and sequence.unsent_version != self.weight_version:
            deltas.append(sequence.take_delta())
        new_tokens = new_tokens if taken == len(new_tokens) else new_tokens[:taken]
        sequence.tokens += new_tokens
        sequence.unsent += new_tokens
        sequence.unsent_logprobs += scores if taken == len(scores) else scores[:taken]
        sequence.unsent_version = self.weight_version
        sequence.unsent_is_stale |= sequence.is_stale
        self._stats.generated_tokens += taken
        if sequence.drafts:
            self._count_drafts(sequence, accepted=min(num_accepted, taken))
        if reason is not None:
            self._end(sequence, reason)
        if request.is_streamed or reason is not None or not sequence.is_reported:
            deltas.append(sequence.take_delta(reason, stop_token))
        return deltas

    def _count_drafts(self, sequence: Sequence, *, accepted: int) -> None:
        sequence.num_drafted += len(sequence.drafts)
        sequence.num_accepted += accepted
        self._stats.drafted_tokens += len(sequence.drafts)
        self._stats.accepted_tokens += accepted
        sequence.drafts = []

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        is_whole = reason in (FinishReason.STOP, FinishReason.LENGTH)
        self.scheduler.remove(sequence, keep_state=is_whole)
        left = self._requests[sequence.request_id]
        left.remove(sequence)
        if not left:
            del self._requests[sequence.request_id]


def _addresses(model: LanguageModel) -> tuple[int, ...]:
    """Addresses of the weights."""
    return tuple(tensor.data_ptr() for tensor in model.state_dict().values())
