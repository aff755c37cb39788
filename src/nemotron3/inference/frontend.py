"""From messages and text to requests of the engine: prompts, stop strings, budgets, grammars.

`LLM` and `AsyncLLM` have one each. Requests that cannot be answered raise an error here, before any
work starts.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from itertools import islice
from threading import Lock
from typing import Any

from nemotron3.errors import ConfigError, DataError
from nemotron3.inference.output_processor import OutputProcessor, Prompt, RequestOutputProcessor
from nemotron3.inference.requests import SamplingParams, StructuredOutput, TokenConstraint
from nemotron3.inference.sampling.stop_strings import StopStrings
from nemotron3.inference.sampling.thinking_budget import BudgetIds, ThinkingBudget, budget_ids
from nemotron3.inference.sequences import EngineRequest
from nemotron3.inference.structured_output.grammar_compiler import GrammarCompiler
from nemotron3.text import CHAT_STYLES, AssistantMessage, ChatStyle, ChatTemplate, Tokenizer
from nemotron3.text.chat_style import style_of_template
from nemotron3.text.jinja_render import render_jinja
from nemotron3.text.messages import parse_messages, parse_tools
from nemotron3.text.vocabulary import IM_START, THINK_END, THINK_START

_KEPT_BOUNDARIES = 2
"""Number of last turns whose beginnings are cached: the next request of a conversation has the same
tokens up to one of them."""


class Frontend:
    """Tokenizer, chat template and grammars of one model."""

    def __init__(
        self, tokenizer: Tokenizer | None, *, vocab_size: int, eos_ids: frozenset[int], name: str
    ) -> None:
        """Without a `tokenizer`, prompts and answers are token ids, and text raises ConfigError."""
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self.model_name = name
        source = tokenizer.chat_template if tokenizer is not None else None
        style = CHAT_STYLES["nano"] if source is None else style_of_template(source)
        self._jinja = source if style is None else None
        self.template = ChatTemplate(style or ChatStyle(name="foreign"))
        self._compiler: GrammarCompiler | None = None
        self._building = Lock()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises ConfigError if none was given."""
        return self._tokenizer_for("text")

    def _tokenizer_for(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise ConfigError(
                f"{what} needs a tokenizer, and this model was given without one; give "
                "tokenizer=..., or use token ids alone"
            )
        return self._tokenizer

    def chat_prompt(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        force_nonempty_content: bool = False,
        prefix_ids: Sequence[int] = (),
        num_prefix_messages: int = 0,
        **options: Any,
    ) -> Prompt:
        """Render a conversation; `options` are those of `ChatTemplate.render`.

        With `prefix_ids` the first `num_prefix_messages` messages, the last of which is the
        assistant's, are these ids, and only what follows is rendered.
        """
        if self.tokenizer.token_to_id(IM_START) is None:
            raise ConfigError(
                f": the vocabulary of {self.model_name} has no {IM_START}, which opens a turn of a "
                "chat; continue a text instead",
                field="messages",
            )
        if prefix_ids and self._jinja is not None:
            raise ConfigError(
                "continues token ids by the family's chat template, and the model has another one; "
                "leave the ids out",
                field="prefix_ids",
            )
        if self._jinja is not None:
            settings = {name: value for name, value in options.items() if value is not None}
            text = render_jinja(
                self._jinja,
                [dict(m) for m in messages],
                tools=list(tools or ()) or None,
                **settings,
            )
            ids = self.tokenizer.encode(text)
            is_open = text.rstrip().endswith(THINK_START)
        elif prefix_ids:
            # What the ids stand for is not read: a call that was cut off is no message, for one.
            unread = [AssistantMessage()] * num_prefix_messages
            said = parse_messages([*unread, *messages[num_prefix_messages:]])
            following = said[num_prefix_messages:]
            rendered = self.template.continuation(
                following, self.tokenizer, after_token=prefix_ids[-1], **options
            )
            ids = [*prefix_ids, *rendered.tokens(self.tokenizer).ids]
            is_open = rendered.is_reasoning_open
        else:
            rendered = self.template.render(messages, tools=tools, **options)
            ids = rendered.tokens(self.tokenizer).ids
            is_open = rendered.is_reasoning_open
        return Prompt(
            ids=tuple(ids),
            is_chat=True,
            is_reasoning_open=is_open,
            tools=tuple(parse_tools(tools)),
            force_nonempty_content=force_nonempty_content,
        )

    def text_prompt(self, text: str) -> Prompt:
        """A text to continue."""
        ids = self.tokenizer.encode(text)
        if not ids:
            raise DataError("is empty; give at least one character to continue", field="prompt")
        return self.ids_prompt(ids)

    def ids_prompt(self, ids: Sequence[int]) -> Prompt:
        """Token ids to continue; they may be a rendered conversation."""
        return Prompt(ids=tuple(ids), is_reasoning_open=self._ends_in_reasoning(ids))

    def _ends_in_reasoning(self, ids: Sequence[int]) -> bool:
        """Whether `<think>` is the last tag, in the last turn."""
        if self._tokenizer is None:
            return False
        start = self._tokenizer.token_to_id(THINK_START)
        if start is None or start not in ids:
            return False
        ends = {self._tokenizer.token_to_id(tag) for tag in (THINK_END, IM_START)} | self.eos_ids
        return next(token for token in reversed(ids) if token == start or token in ends) == start

    def compile_grammar(self, prompt: Prompt, params: SamplingParams) -> TokenConstraint | None:
        """The compiled grammar of a request's answers, None if it has none; thread-safe."""
        if params.structured is None:
            return None
        stop_ids = frozenset(params.stop_token_ids)
        stop_ids |= frozenset() if params.ignore_eos else self.eos_ids
        return self.compiler().constraint(
            params.structured, stop_ids=stop_ids, is_reasoning_open=prompt.is_reasoning_open
        )

    def check(self, structured: StructuredOutput) -> "Future[str | None]":
        """The error of a grammar, found by another process; None if it can be compiled."""
        return self.compiler().check(structured)

    def compiler(self) -> GrammarCompiler:
        """The compiler of grammars, created by the first call, which takes seconds."""
        with self._building:
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    self._tokenizer_for("structured output"),
                    self.template.style,
                    vocab_size=self.vocab_size,
                )
            return self._compiler

    def close(self) -> None:
        """End the process that checks grammars, if one runs."""
        with self._building:
            if self._compiler is not None:
                self._compiler.close()

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        grammar: TokenConstraint | None = None,
        *,
        is_streamed: bool = True,
        may_be_continued: bool = True,
    ) -> EngineRequest:
        """A request in token ids; `grammar` is that of `params`, compiled here if not given."""
        if grammar is None:
            grammar = self.compile_grammar(prompt, params)
        if params.stop:
            self._tokenizer_for(f"stop = {params.stop!r}")
        if params.reasoning_budget is not None:
            self._tokenizer_for("reasoning_budget")

        def stop() -> StopStrings | None:
            if not params.stop:
                return None
            return StopStrings(self.tokenizer, params, is_chat=prompt.is_chat)

        return EngineRequest(
            request_id=request_id,
            prompt=prompt.ids,
            params=params,
            boundaries=self._turns(prompt.ids),
            is_streamed=is_streamed,
            may_be_continued=may_be_continued,
            make_stop=stop,
            make_budget=partial(self._budget, prompt, params),
            make_constraint=lambda: grammar.fork() if grammar is not None else None,
        )

    def output_processor(
        self, prompt: Prompt, params: SamplingParams, request_id: str
    ) -> RequestOutputProcessor:
        """The processor of a request's answers."""
        each = [
            OutputProcessor(
                prompt, params, self._tokenizer, index, self.eos_ids, self._budget(prompt, params)
            )
            for index in range(params.n)
        ]
        return RequestOutputProcessor(request_id, prompt, each)

    def _budget(self, prompt: Prompt, params: SamplingParams) -> ThinkingBudget | None:
        """A new reasoning budget: the engine and the output processor have one for each answer."""
        if params.reasoning_budget is None:
            return None
        return ThinkingBudget(
            budget=params.reasoning_budget,
            grace=params.reasoning_grace,
            ids=self._budget_ids,
            is_open=prompt.is_reasoning_open,
            has_tools=bool(prompt.tools),
            last_token=prompt.ids[-1] if prompt.ids else None,
        )

    def _turns(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The beginnings of the last turns of a conversation."""
        if self._tokenizer is None:
            return ()
        start = self._tokenizer.token_to_id(IM_START)
        places = (i for i in range(len(ids) - 1, 0, -1) if ids[i] == start)
        return tuple(islice(places, _KEPT_BOUNDARIES))

    @cached_property
    def _budget_ids(self) -> BudgetIds:
        return budget_ids(self.tokenizer, self.template.style)
