"""Inference in three lines, for scripts and notebooks, in vLLM's words.

    from nemotron3 import LLM, SamplingParams
    llm = LLM("runs/tiny/model")
    print(llm.chat([{"role": "user", "content": "Who are you?"}])[0].outputs[0].content)

All requests of a call are answered together. `async_llm.py` is the form for servers.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemotron3.errors import ConfigError
from nemotron3.inference.answers import AnswerDelta, Answers, Prompt, RequestOutput
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import EngineStats
from nemotron3.inference.loading import load
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import ChatTemplate, Tokenizer

OnDelta = Callable[[int, AnswerDelta], None]


class LLM:
    """A model that answers."""

    def __init__(
        self,
        model: str | Path | LanguageModel,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        """`model` is a directory in the published layout, or a model together with a tokenizer."""
        self._engine, self._frontend = load(
            model, tokenizer, config=config, device=device, dtype=dtype
        )
        self._num_requests = 0

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._frontend.tokenizer

    @property
    def template(self) -> ChatTemplate:
        """How conversations are written for the model."""
        return self._frontend.template

    @property
    def model_name(self) -> str:
        """The directory's name."""
        return self._frontend.model_name

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.max_model_len

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self._engine.stats()

    def generate(
        self,
        prompts: str | Prompt | Sequence[str | Prompt | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_delta: OnDelta | None = None,
    ) -> list[RequestOutput]:
        """Continue texts, or lists of token ids; results are in the order of the prompts.

        `on_delta(prompt_index, delta)` is called with the pieces of answers as they come.
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
        return Prompt(ids=tuple(prompt))

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        on_delta: OnDelta | None,
    ) -> list[RequestOutput]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts were given and {len(params)} params")
        waiting: deque[EngineRequest] = deque()
        answers: dict[str, Answers] = {}
        places: dict[str, int] = {}
        for place, (prompt, how) in enumerate(zip(prompts, params, strict=True)):
            self._num_requests += 1
            name = str(self._num_requests)
            request = self._frontend.request(prompt, how, name)
            self._engine.check(request)
            waiting.append(request)
            answers[name], places[name] = self._frontend.answers(prompt, how, name), place
        try:
            while waiting or self._engine.has_work:
                while waiting and self._engine.has_room(waiting[0]):
                    self._engine.add(waiting.popleft())
                for progress in self._engine.step():
                    delta = answers[progress.request_id].push(progress)
                    if on_delta is not None:
                        on_delta(places[progress.request_id], delta)
        finally:
            for name in answers:  # nothing is left behind by an interrupted call
                self._engine.abort(name)
        return [each.output() for each in answers.values()]
