r"""Structured output: answers that follow a JSON schema, a regular expression, a choice, a grammar.

A grammar is compiled once. Before every token it determines the tokens that can still lead to a
complete answer; all others are masked, in tens of microseconds per token (`grammar_library.py`).

Design decisions:

- **Reasoning is free.** If the prompt ends within reasoning, the grammar begins after `</think>`,
  and no end token is allowed before. Otherwise it begins with the answer, and the model cannot open
  reasoning of its own.
- **End tokens are allowed exactly when the answer is complete**, and nothing else is when it cannot
  be continued. A request without any end token (`ignore_eos`) cannot have structured output.
- **The line end of the chat style is allowed.** Nano and Super write `</think>\n`; a model that may
  not write the line end would begin the answer in a way that it has never seen in training. So one
  token of line ends may precede the answer; the parser of answers drops it.
- **White space in JSON is limited.** `{` followed by endless line ends is a prefix of valid JSON,
  and models produce it; 40 characters in one place are enough for indentation.
- **Text is text.** A special token matches nothing in a schema, expression or string; a Lark
  grammar may name one (`<tool_call>`), and then matches it.
- **A grammar that cannot be enforced is an error**, before any work starts: an unknown keyword of a
  JSON schema is not ignored. So is a grammar of more than `MAX_GRAMMAR_BYTES`, and one that another
  process cannot compile within limits of time and memory (`grammar_checks.py`): only grammars that
  passed there are compiled here. The automata have limits of their own; an answer that exceeds one
  fails alone.

    compiler = GrammarCompiler(tokenizer, style, vocab_size=131_072)
    constraint = compiler.constraint(
        StructuredOutput(kind="regex", value=r"\d+ km"), stop_ids=stop_ids, is_reasoning_open=False
    )
"""

import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from enum import Enum, auto
from functools import partial
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from nemotron3.errors import ConfigError, DataError
from nemotron3.inference.requests import StructuredOutput
from nemotron3.inference.structured_output.grammar_checks import GrammarChecks
from nemotron3.inference.structured_output.grammar_library import GrammarLibrary, message_of
from nemotron3.text import ChatStyle, Tokenizer

MAX_GRAMMAR_BYTES = 256 * 1024
"""Longest schema, expression, list of choices or grammar, as text."""

_MAX_CACHED = 64


class GrammarCompiler:
    """Compiles the grammars of requests over one vocabulary; one object per engine.

    The most recently used grammars are cached, since a service uses the same few. An automaton
    grows with the tokens of all answers that use it and fails at its limit; it is then compiled
    again, so that a grammar can be used for any time. Thread-safe.
    """

    def __init__(
        self, tokenizer: Tokenizer, style: ChatStyle | None = None, *, vocab_size: int
    ) -> None:
        self._vocab_size = vocab_size
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        entries: dict[str, Any] = {
            "tokens": tokens,
            "special_ids": sorted(tokenizer.special_ids),
            "stop_ids": list(tokenizer.stop_ids),
            "vocab_size": vocab_size,
        }
        self._library = GrammarLibrary(
            **entries, encode=partial(tokenizer.encode, parse_special=False)
        )
        self._checks = GrammarChecks(entries)
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = Lock()
        self._end = tokenizer.think_end_id
        self._eos = tokenizer.stop_ids
        has_glue = style is not None and style.reasoning_end.endswith("\n")
        self._glue = _line_ends(tokenizer) if has_glue else frozenset[int]()

    def constraint(
        self, structured: StructuredOutput, *, stop_ids: frozenset[int], is_reasoning_open: bool
    ) -> "AnswerConstraint":
        """The constraint of one answer; a ConfigError if the grammar cannot be enforced."""
        if not stop_ids:
            raise ConfigError(
                "needs a token that ends the answer, and with ignore_eos there is none; leave out "
                "ignore_eos or give stop_token_ids",
                field=_name(structured),
            )
        key = (structured.kind, _text(structured))
        error = self.check(structured).result()
        if error is not None:
            raise ConfigError(error, field=_name(structured))
        try:
            matcher = self._compile(key)
        except ConfigError as refused:
            raise refused.renamed({structured.kind: _name(structured)}) from refused

        def renew() -> Any:
            return self._compile(key, worn=matcher).deep_copy()

        return AnswerConstraint(
            matcher.deep_copy(),
            renew=renew,
            vocab_size=self._vocab_size,
            stop_ids=stop_ids,
            eos_ids=self._eos,
            think_end_id=self._end if is_reasoning_open else None,
            glue_ids=self._glue,
        )

    def check(self, structured: StructuredOutput) -> "Future[str | None]":
        """The error of a grammar, None if it can be compiled; checked in order of arrival.

        Raises ConfigError at once for a value of the wrong type or size.
        """
        return self._checks.check(structured.kind, _text(structured))

    def close(self) -> None:
        """End the process that checks grammars; no grammar can be compiled after that."""
        self._checks.close()

    def _compile(self, key: tuple[str, str], *, worn: Any = None) -> Any:
        """The matcher of a checked grammar, cached; the lock is not held while it is compiled."""
        with self._lock:
            matcher = self._compiled.get(key)
        if matcher is None or matcher is worn:
            matcher = self._library.compile(*key)
        with self._lock:
            self._compiled[key] = matcher
            self._compiled.move_to_end(key)
            while len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        return matcher


class _Phase(Enum):
    REASONING = auto()
    GLUE = auto()  # right after `</think>`
    ANSWER = auto()
    ENDED = auto()


class AnswerConstraint:
    """The allowed tokens of one answer that follows a grammar (a `TokenConstraint`)."""

    def __init__(
        self,
        matcher: Any,
        *,
        renew: Callable[[], Any],
        vocab_size: int,
        stop_ids: frozenset[int],
        eos_ids: Iterable[int],
        think_end_id: int | None,
        glue_ids: frozenset[int],
    ) -> None:
        self._matcher = matcher
        self._renew = renew
        self._taken: list[int] = []  # tokens that the matcher has consumed
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids
        self._stops = torch.tensor(sorted(stop_ids))
        self._ends = torch.tensor(sorted({*stop_ids, *eos_ids}))
        self._think_end_id = think_end_id
        self._glue_ids = glue_ids
        self._phase = _Phase.ANSWER if think_end_id is None else _Phase.REASONING

    def mask(self) -> Bool[Tensor, " vocab"]:
        """True for each allowed token."""
        if self._phase is _Phase.REASONING:
            allowed = torch.ones(self._vocab_size, dtype=torch.bool)
            allowed[self._ends] = False
            return allowed
        if self._phase is _Phase.ENDED:
            allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
            allowed[self._stops] = True
            return allowed
        bits = np.unpackbits(self._bits(), bitorder="little", count=self._vocab_size)
        allowed = torch.as_tensor(bits, dtype=torch.bool)
        allowed[self._ends] = False
        allowed[self._stops] = self._matcher.is_accepting()
        if not allowed.any():
            raise DataError(
                "no token can continue the answer under its grammar; "
                "a grammar must not name tokens that end an answer"
            )
        if self._phase is _Phase.GLUE:
            allowed[list(self._glue_ids)] = True
        return allowed

    def accept(self, token: int) -> None:
        """Advance by the token that was chosen."""
        match self._phase:
            case _Phase.REASONING:
                if token == self._think_end_id:
                    self._phase = _Phase.GLUE if self._glue_ids else _Phase.ANSWER
            case _Phase.GLUE:
                self._phase = _Phase.ANSWER
                if token not in self._glue_ids or self._matcher.validate_tokens([token]):
                    self.accept(token)
            case _Phase.ANSWER:
                if token in self._stop_ids:
                    self._phase = _Phase.ENDED
                else:
                    self._matcher.consume_token(token)
                    self._taken.append(token)
            case _Phase.ENDED:
                pass

    def fork(self) -> "AnswerConstraint":
        """An independent copy, to look ahead along drafted tokens."""
        fork = copy.copy(self)
        fork._matcher, fork._taken = self._matcher.deep_copy(), list(self._taken)
        return fork

    def _bits(self) -> NDArray[np.uint8]:
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._matcher = self._renew()
            self._matcher.consume_tokens(self._taken)
            bits = self._matcher.compute_bitmask()
            if self._matcher.is_error():
                why = message_of(self._matcher)
                raise DataError(f"the answer exceeds a limit of its grammar: {why}")
        return np.frombuffer(bits, dtype=np.uint8)


def _line_ends(tokenizer: Tokenizer) -> frozenset[int]:
    tokens = set(range(tokenizer.vocab_size)) - tokenizer.special_ids
    return frozenset(i for i in tokens if set(tokenizer.token_bytes(i)) == {ord("\n")})


def _name(structured: StructuredOutput) -> str:
    """What the request calls it, for errors."""
    return structured.source or structured.kind


def _text(structured: StructuredOutput) -> str:
    """The grammar as text; raises ConfigError for a value of the wrong type or size."""
    kind, value, name = structured.kind, structured.value, _name(structured)
    match kind:
        case "json_object":
            if value is not None:
                raise ConfigError(f"takes no value, {value!r} was given; leave it out", field=name)
            return '{"type": "object"}'
        case "json_schema":
            text = _schema_text(value, name)
        case "choice":
            if not isinstance(value, list | tuple) or not value:
                raise ConfigError(f"is {value!r}; give a list of one or more strings", field=name)
            choices = list(cast(Sequence[Any], value))
            if not all(isinstance(choice, str) and choice for choice in choices):
                raise ConfigError(
                    f"is {choices!r}; every choice must be a non-empty string", field=name
                )
            text = json.dumps(choices)
        case _:
            if not isinstance(value, str):
                raise ConfigError(f"is {value!r}; give it as a string", field=name)
            text = value
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise ConfigError(
            f"has {len(text.encode())} bytes; give one of at most {MAX_GRAMMAR_BYTES}",
            field=name,
        )
    return text


def _schema_text(schema: Any, name: str) -> str:
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"is not JSON ({error}); give a JSON schema", field=name) from error
    if not isinstance(schema, dict):
        raise ConfigError(f"is {text}; give an object ({{}} for any JSON value)", field=name)
    return text
