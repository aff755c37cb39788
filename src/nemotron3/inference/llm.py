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
from nemotron3.inference.engine import EngineStats
from nemotron3.inference.model_runner.weights import RunningRequests, Weights
from nemotron3.inference.output_processor import (
    AnswerDelta,
    Prompt,
    RequestOutput,
    RequestOutputProcessor,
)
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest

OnDelta = Callable[[int, AnswerDelta], None]
OnStep = Callable[[], None]


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

        `on_delta` and `on_step` may call it while answers are generated; `running` determines how
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
        on_step: OnStep | None = None,
    ) -> list[RequestOutput]:
        """Continue texts or lists of token ids; results are in the order of the prompts.

        Without `params` the defaults of the model's directory apply. `on_delta(prompt_index,
        delta)` is called with the parts of answers as they are generated, `on_step()` after each
        step of the engine.
        """
        given = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
        return self._run([self._prompt(prompt) for prompt in given], params, on_delta, on_step)

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
        on_step: OnStep | None = None,
    ) -> list[RequestOutput]:
        if params is None:
            free = SamplingParams(**self.defaults.sampling)
            params = [self.with_default_length(prompt, free) for prompt in prompts]
        elif isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts were given and {len(params)} params")
        waiting: deque[EngineRequest] = deque()
        processors: list[RequestOutputProcessor] = []
        for place, (prompt, how) in enumerate(zip(prompts, params, strict=True)):
            name = str(place)  # unique: no request of another call is left in the engine
            request = self._frontend.request(prompt, how, name)
            self._engine.check(request)
            waiting.append(request)
            processors.append(self._frontend.output_processor(prompt, how, name))
        try:
            while waiting or self._engine.has_work:
                while waiting and self._engine.has_room(waiting[0]):
                    self._engine.add(waiting.popleft())
                for token_delta in self._engine.step():
                    place = int(token_delta.request_id)
                    if on_delta is None:
                        processors[place].collect(token_delta)
                    else:
                        on_delta(place, processors[place].push(token_delta))
                if on_step is not None:
                    on_step()
        finally:
            for each in processors:  # for a call that was interrupted
                self._engine.abort(each.request_id)
        return [each.output() for each in processors]
