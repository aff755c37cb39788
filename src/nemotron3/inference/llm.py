"""Inference in three lines, for scripts and notebooks, with vLLM's names.

    from nemotron3 import LLM, SamplingParams
    llm = LLM("runs/tiny/model")
    print(llm.chat([{"role": "user", "content": "Who are you?"}])[0].outputs[0].content)

All requests of a call are answered together. The model may also be one in memory; token ids need no
tokenizer: `LLM(model).generate([[1, 2, 3]])`. `async_llm.py` is for servers.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from nemotron3.errors import ConfigError
from nemotron3.inference.base_llm import BaseLLM
from nemotron3.inference.engine import Engine, EngineStats
from nemotron3.inference.frontend import Frontend
from nemotron3.inference.model_runner.weights import RunningRequests, Weights
from nemotron3.inference.output_processor import (
    AnswerDelta,
    CompletionOutput,
    Prompt,
    RequestOutput,
    RequestOutputProcessor,
)
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest

OnDelta = Callable[[int, AnswerDelta], None]


class LLM(BaseLLM):
    """A model that answers prompts and conversations."""

    def stats(self) -> EngineStats:
        """Counts of the engine's work so far."""
        return self._engine.stats()

    @property
    def weight_version(self) -> int:
        """Version of the weights with which the next token is sampled."""
        return self._engine.weight_version

    def update_weights(
        self,
        weights: Weights,
        *,
        version: int | None = None,
        running: RunningRequests = "recompute",
    ) -> int:
        """Replace the model's weights (`Engine.update_weights`); returns their version.

        An `on_delta` callback may call it while answers are generated; `running` determines how
        these continue.
        """
        return self._engine.update_weights(weights, version=version, running=running)

    def invalidate_caches(
        self, *, version: int | None = None, running: RunningRequests = "recompute"
    ) -> int:
        """Drop the states of earlier weights, after the caller has changed the model's."""
        return self._engine.invalidate_caches(version=version, running=running)

    def reset_prefix_cache(self) -> None:
        """Drop the cached states of all prompts.

        A prefill from a cached state and one of the whole prompt differ by rounding. A program
        whose results must be reproducible bit for bit calls this before each part of its work.
        """
        self._engine.reset_prefix_cache()

    def generate(
        self,
        prompts: str | Prompt | Sequence[str | Prompt | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_delta: OnDelta | None = None,
    ) -> list[RequestOutput]:
        """Continue texts or lists of token ids; results are in the order of the prompts.

        Without `params` the defaults of the model's directory apply. `on_delta(prompt_index,
        delta)` is called with the parts of answers as they are generated.
        """
        given = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
        return self._run([self._prompt(prompt) for prompt in given], params, on_delta)

    def chat(
        self,
        messages: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        on_delta: OnDelta | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them.

        `options` are those of `ChatTemplate.render` (`enable_thinking`, `effort`, …) and
        `force_nonempty_content`.
        """
        several = bool(messages) and isinstance(messages[0], list | tuple)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [
            self._frontend.chat_prompt(conversation, tools=tools, **options)
            for conversation in conversations
        ]
        return self._run(prompts, params, on_delta)

    def _prompt(self, prompt: str | Prompt | Sequence[int]) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str):
            return self._frontend.text_prompt(prompt)
        return self._frontend.ids_prompt(prompt)

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        on_delta: OnDelta | None,
    ) -> list[RequestOutput]:
        if params is None:
            free = SamplingParams(**self.defaults.sampling)
            params = [self.with_default_length(prompt, free) for prompt in prompts]
        elif isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts were given and {len(params)} params")
        with self.requests(on_delta) as requests:
            for prompt, how in zip(prompts, params, strict=True):
                requests.add(prompt, how)
            while requests.has_work:
                requests.step()
            return requests.outputs()

    def requests(self, on_delta: OnDelta | None = None) -> "OpenRequests":
        """Requests that are answered step by step, and that more can be added to meanwhile."""
        return OpenRequests(self._engine, self._frontend, on_delta)


class OpenRequests:
    """Requests of one caller; a context, at whose end those without an answer are aborted.

    with llm.requests() as requests:
        requests.add(prompt, params)
        while requests.has_work:
            for place, answer in requests.step():
                ...  # may add others
    """

    def __init__(self, engine: Engine, frontend: Frontend, on_delta: OnDelta | None = None) -> None:
        """`on_delta` is that of `LLM.generate`; without, answers are read when they have ended."""
        self._engine, self._frontend, self._on_delta = engine, frontend, on_delta
        self._waiting: deque[EngineRequest] = deque()
        self._processors: list[RequestOutputProcessor] = []

    def __enter__(self) -> "OpenRequests":
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._processors:  # for a caller that was interrupted
            self._engine.abort(each.request_id)

    @property
    def has_work(self) -> bool:
        """Whether a request is not answered yet."""
        return bool(self._waiting) or self._engine.has_work

    def add(self, prompt: Prompt, params: SamplingParams, *, may_be_continued: bool = True) -> int:
        """Add a request; returns its place in the order of all.

        Without `may_be_continued` the prefix cache gets no state of prompt and answers: a caller
        knows that no later prompt begins like them.
        """
        place = len(self._processors)
        name = str(place)  # unique: no request of another caller is left in the engine
        is_streamed = self._on_delta is not None
        request = self._frontend.request(
            prompt, params, name, is_streamed=is_streamed, may_be_continued=may_be_continued
        )
        self._engine.check(request)
        self._waiting.append(request)
        self._processors.append(self._frontend.output_processor(prompt, params, name))
        return place

    def step(self) -> list[tuple[int, CompletionOutput]]:
        """Execute one step of the engine; returns the answers that it has ended, with the places of
        their requests."""
        while self._waiting and self._engine.has_room(self._waiting[0]):
            self._engine.add(self._waiting.popleft())
        ended: list[tuple[int, CompletionOutput]] = []
        for token_delta in self._engine.step():
            place = int(token_delta.request_id)
            processor = self._processors[place]
            if self._on_delta is None:
                processor.collect(token_delta)
            else:
                self._on_delta(place, processor.push(token_delta))
            if token_delta.finish_reason is not None:
                ended.append((place, processor.each[token_delta.index].output()))
        return ended

    def outputs(self) -> list[RequestOutput]:
        """All answers to all requests; complete when there is no work left."""
        return [each.output() for each in self._processors]
