"""An engine in a thread of its own, with answers as asynchronous streams, for servers.

    llm = AsyncLLM("runs/tiny/model")
    async with llm.submit(llm.prepare_chat(messages), SamplingParams(), request_id="a") as stream:
        async for delta in stream: ...
    stream.output()

The thread owns the engine; other threads only read its counts. Requests and cancellations reach it
through a queue, and tokens return to the event loop that submitted the request. A slow reader
delays no other: its deltas are queued. Leaving a stream early aborts its request.
"""

import asyncio
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from nemotron3.errors import ConfigError, OverloadedError
from nemotron3.inference.base_llm import BaseLLM
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import EngineStats
from nemotron3.inference.generation_config import Source
from nemotron3.inference.model_runner.weights import RunningRequests, Weights
from nemotron3.inference.output_processor import (
    AnswerDelta,
    Prompt,
    RequestOutput,
    RequestOutputProcessor,
)
from nemotron3.inference.requests import (
    FailureKind,
    FinishReason,
    PromptReport,
    SamplingParams,
    StructuredOutput,
    TokenConstraint,
    TokenDelta,
)
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.weights import WeightFormat
from nemotron3.text import Tokenizer

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Stream:
    """The deltas of all answers to one request, in order of generation."""

    def __init__(self, processor: RequestOutputProcessor, abort: Callable[[str], None]) -> None:
        self._processor = processor
        self._abort = abort
        self._deltas: deque[AnswerDelta] = deque()
        self._news = asyncio.Event()
        self.open = set(range(len(processor.each)))
        """Indices of the unfinished answers; used by the engine's thread."""
        self.loop = asyncio.get_running_loop()
        """The event loop of the client; all attributes but `open` are used in it alone."""

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self._processor.request_id

    async def prompt_report(self) -> PromptReport:
        """The report on the prompt; waits for the first token."""
        while self._processor.report is None and not self._processor.is_finished:
            await self._next_news()
        return self._processor.report or PromptReport()

    def output(self) -> RequestOutput:
        """The answers so far; complete after the stream has ended."""
        return self._processor.output()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> AnswerDelta:
        while not self._deltas:
            if self._processor.is_finished:
                raise StopAsyncIteration
            await self._next_news()
        return self._deltas.popleft()

    async def aclose(self) -> None:
        """Abort the request if it has not finished."""
        if not self._processor.is_finished:
            self._abort(self.request_id)

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _next_news(self) -> None:
        self._news.clear()
        if self._deltas:
            return
        try:
            await self._news.wait()
        except asyncio.CancelledError:
            await self.aclose()
            raise

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache; 0 before the first token."""
        report = self._processor.report
        return 0 if report is None else report.num_cached_tokens

    def receive(self, delta: TokenDelta) -> None:
        """Process the tokens of a step, and wake the reader."""
        self._deltas.append(self._processor.push(delta))
        self._news.set()


class AsyncLLM(BaseLLM):
    """A model that answers many clients at the same time."""

    def __init__(
        self,
        model: str | Path | LanguageModel,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        weights: WeightFormat | None = None,
        generation_config: Source = "auto",
        lora: str | Path | None = None,
    ) -> None:
        super().__init__(
            model,
            tokenizer=tokenizer,
            config=config,
            device=device,
            dtype=dtype,
            weights=weights,
            generation_config=generation_config,
            lora=lora,
        )
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], Sequence[TokenDelta]]] = deque()
        self._streams: dict[str, Stream] = {}
        self._num_answers = 0
        self._is_closing = False
        self._is_paused = False
        self._calls: set[Future[Any]] = set()
        """Calls that the engine's thread has not finished."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive() and not self._is_closing

    def stats(self) -> EngineStats:
        """Counts of the engine's work so far."""
        return self._engine.stats()

    @property
    def weight_version(self) -> int:
        """Version of the weights with which the next token is sampled."""
        return self._engine.weight_version

    @property
    def is_paused(self) -> bool:
        """Whether requests wait for `resume_generation`."""
        return self._is_paused

    async def pause_generation(self) -> None:
        """Stop all requests after the current step; they keep their states."""
        await self._call(partial(self._set_paused, value=True))

    async def resume_generation(self) -> None:
        """Continue all requests."""
        await self._call(partial(self._set_paused, value=False))

    async def update_weights(
        self,
        weights: Weights,
        *,
        version: int | None = None,
        running: RunningRequests = "recompute",
    ) -> int:
        """Replace the model's weights between two steps (`Engine.update_weights`).

        Generation need not be paused for it.
        """
        return await self._call(
            partial(self._engine.update_weights, weights, version=version, running=running)
        )

    async def invalidate_caches(
        self, *, version: int | None = None, running: RunningRequests = "recompute"
    ) -> int:
        """Drop the states of earlier weights (`Engine.invalidate_caches`).

        Pause generation while you change the weights of a model in memory.
        """
        return await self._call(
            partial(self._engine.invalidate_caches, version=version, running=running)
        )

    def prepare_chat(self, messages: Sequence[Any], **options: Any) -> Prompt:
        """A conversation as a prompt; `options` are those of `LLM.chat`."""
        return self._frontend.chat_prompt(messages, **options)

    def prepare_text(self, text: str) -> Prompt:
        """A prompt from a text to continue."""
        return self._frontend.text_prompt(text)

    def prepare_ids(self, ids: Sequence[int]) -> Prompt:
        """A prompt from token ids to continue."""
        return self._frontend.ids_prompt(ids)

    def prepare_grammars(self) -> None:
        """Start the process that compiles grammars, so that no request waits for its start."""
        self._frontend.check(StructuredOutput(kind="json_object")).result()

    async def compile_grammar(
        self, prompt: Prompt, params: SamplingParams
    ) -> TokenConstraint | None:
        """The compiled grammar of a request's answers, None if it has none.

        Grammars are compiled in order of arrival. A task that is cancelled leaves the queue.
        """
        if params.structured is None:
            return None
        checking = await asyncio.to_thread(self._frontend.check, params.structured)
        try:
            await asyncio.wrap_future(checking)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise OverloadedError("the engine has been closed; start another one") from None
        return await asyncio.to_thread(self._frontend.compile_grammar, prompt, params)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        grammar: TokenConstraint | None = None,
    ) -> Stream:
        """Submit a request; returns the stream of its answers.

        Invalid requests raise here, before any work starts. `grammar` is the result of
        `compile_grammar` for the same prompt and parameters; without it the grammar is compiled
        here, which blocks the event loop.
        """
        request = self._frontend.request(prompt, params, request_id, grammar)
        self._engine.check(request)
        config = self._engine.config
        may = config.max_num_seqs + config.max_num_waiting
        with self._changed:
            if not self.is_alive:
                raise OverloadedError("the engine has been closed; start another one")
            if request_id in self._streams:
                raise ConfigError(f"request {request_id!r} is being answered already")
            if self._num_answers and self._num_answers + params.n > may:
                raise OverloadedError(
                    f"{self._num_answers} answers are being generated or wait, of at most {may}; "
                    "try later"
                )
            processor = self._frontend.output_processor(prompt, params, request_id)
            stream = Stream(processor, self._abort)
            self._streams[request_id] = stream
            self._num_answers += params.n
            self._command(partial(self._add, request))
        return stream

    async def drain(self, timeout_s: float) -> bool:
        """Wait until all requests have finished; returns whether they did within `timeout_s`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while self._streams and loop.time() < end:
            await asyncio.sleep(0.02)
        return not self._streams

    def close(self) -> None:
        """Abort all requests and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self._frontend.close()

    async def _call(self, function: Callable[[], T]) -> T:
        """Call a function in the engine's thread, between two steps."""
        outcome: Future[T] = Future()

        def command() -> Sequence[TokenDelta]:
            if outcome.set_running_or_notify_cancel():
                try:
                    outcome.set_result(function())
                except Exception as error:  # noqa: BLE001 - it is raised in the caller
                    outcome.set_exception(error)
            return ()

        with self._changed:
            if not self.is_alive:
                raise OverloadedError("the engine has been closed; start another one")
            self._calls.add(outcome)
            outcome.add_done_callback(self._calls.discard)
            self._command(command)
        return await asyncio.wrap_future(outcome)

    def _set_paused(self, *, value: bool) -> None:
        self._is_paused = value

    def _add(self, request: EngineRequest) -> Sequence[TokenDelta]:
        self._engine.add(request)
        return ()

    def _abort(self, request_id: str) -> None:
        with self._changed:
            self._command(partial(self._engine.abort, request_id))

    def _command(self, command: Callable[[], Sequence[TokenDelta]]) -> None:
        self._commands.append(command)
        self._changed.notify()

    def _work(self) -> None:
        """The engine's thread."""
        while True:
            with self._changed:
                while not (self._commands or self._has_steps or self._is_closing):
                    self._changed.wait()
                commands = list(self._commands)
                self._commands.clear()
            if self._is_closing:
                self._fail("the engine is closed", FinishReason.ABORT)
                for call in list(self._calls):
                    call.set_exception(OverloadedError("the engine has been closed"))
                return
            try:
                deltas = [p for command in commands for p in command()]
                if self._has_steps:
                    deltas += self._engine.step()
            except Exception:  # noqa: BLE001 - the outermost handler: clients must be informed
                _log.exception("a step of the engine failed, and so do its requests")
                self._fail("the engine failed in this step; see its log", FinishReason.ERROR)
                continue
            self._deliver(deltas)

    @property
    def _has_steps(self) -> bool:
        return self._engine.has_work and not self._is_paused

    def _fail(self, why: str, reason: FinishReason) -> None:
        """End all requests with an error or an abort."""
        failure = FailureKind.ENGINE if reason is FinishReason.ERROR else None
        over: list[TokenDelta] = []
        for request_id, stream in list(self._streams.items()):
            self._engine.abort(request_id)
            # From the streams: the engine has no record of answers that ended in a failed step.
            over += [
                TokenDelta(request_id, index, (), finish_reason=reason, error=why, failure=failure)
                for index in sorted(stream.open)
            ]
        self._deliver(over)

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, TokenDelta]]] = defaultdict(
            list
        )
        with self._changed:
            for piece in deltas:
                stream = self._streams.get(piece.request_id)
                if stream is None:
                    continue
                by_loop[stream.loop].append((stream, piece))
                if piece.finish_reason is not None:
                    self._num_answers -= 1
                    stream.open.discard(piece.index)
                    if not stream.open:
                        del self._streams[piece.request_id]
        for loop, pieces in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_hand_over, pieces)


def _hand_over(pieces: Sequence[tuple[Stream, TokenDelta]]) -> None:
    for stream, delta in pieces:
        stream.receive(delta)
