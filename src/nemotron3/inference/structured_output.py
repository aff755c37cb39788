r"""Answers that have to have a form: JSON of a schema, an expression, a choice, a grammar.

A grammar is compiled once and then says, before every token, which tokens can still lead to a whole
answer; the others are masked, in tens of microseconds a token (`grammar_library.py`).

Decided here:

- **Reasoning is free.** Where the prompt leaves reasoning open the grammar begins after `</think>`,
  and nothing may end the answer before. Where it does not, the grammar begins with the answer, and
  the model cannot open reasoning of its own.
- **The end tokens may come exactly when the answer is whole**, and nothing else when it cannot go
  on. A request without any end token (`ignore_eos`) cannot be held to a form.
- **The glue of the chat style stays.** Nano and Super write `</think>\n`; a model that is kept from
  its line end starts the answer where it never has. So one token of line ends may come between,
  which the reader of an answer drops.
- **White space in JSON has an end.** `{` and then line ends for ever is JSON too, and models fall
  into it; 40 characters of indentation in one place are enough.
- **Text is text.** A special token matches nothing in a schema, expression or string; a Lark
  grammar may name one (`<tool_call>`), and then means it.
- **What cannot be enforced is an error** before anything runs: an unknown keyword of JSON schema is
  not left out in silence. So is a grammar beyond `MAX_GRAMMAR_BYTES`, and one that another process
  cannot compile in little time and memory (`grammar_checks.py`): only what passed there is compiled
  here. The automata behind have limits of their own; an answer that meets one fails by itself.

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
from nemotron3.inference.grammar_checks import GrammarChecks
from nemotron3.inference.grammar_library import GrammarLibrary, message_of
from nemotron3.inference.requests import StructuredOutput
from nemotron3.inference.vocabulary import ReasoningStyle, Vocabulary

MAX_GRAMMAR_BYTES = 256 * 1024
"""Longest schema, expression, list of choices or grammar, as text."""

_MAX_CACHED = 64


class GrammarCompiler:
    """Compiles what requests ask for, over one vocabulary; one object per engine.

    Compiled grammars are kept, the most recently used ones, since a service asks for the same few.
    An automaton grows with what has been written under it, in all answers together, and fails at
    its limit; it is compiled anew then, so that a grammar in long use does not wear out. May be
    asked from several threads.
    """

    def __init__(
        self, vocabulary: Vocabulary, style: ReasoningStyle | None = None, *, vocab_size: int
    ) -> None:
        self._vocab_size = vocab_size
        tokens = [vocabulary.token_bytes(i) for i in range(vocabulary.vocab_size)]
        entries: dict[str, Any] = {
            "tokens": tokens,
            "special_ids": sorted(vocabulary.special_ids),
            "stop_ids": list(vocabulary.stop_ids),
            "vocab_size": vocab_size,
        }
        self._library = GrammarLibrary(
            **entries, encode=partial(vocabulary.encode, parse_special=False)
        )
        self._checks = GrammarChecks(entries)
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = Lock()
        self._end = vocabulary.think_end_id
        self._eos = vocabulary.stop_ids
        has_glue = style is not None and style.reasoning_end.endswith("\n")
        self._glue = _line_ends(vocabulary) if has_glue else frozenset[int]()

    def constraint(
        self, structured: StructuredOutput, *, stop_ids: frozenset[int], is_reasoning_open: bool
    ) -> "AnswerConstraint":
        """The constraint of one answer; a ConfigError where the form cannot be held."""
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
        """What is wrong with a form, found out in its turn; a ConfigError where that is plain."""
        return self._checks.check(structured.kind, _text(structured))

    def close(self) -> None:
        """End the process that checks; nothing more is compiled."""
        self._checks.close()

    def _compile(self, key: tuple[str, str], *, worn: Any = None) -> Any:
        """The matcher of a form that passed, kept; nobody waits for it who wants another form."""
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
    """Which tokens may come next in one answer that has a form (a `TokenConstraint`)."""

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
        self._taken: list[int] = []  # by the grammar
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids
        self._stops = torch.tensor(sorted(stop_ids))
        self._ends = torch.tensor(sorted({*stop_ids, *eos_ids}))
        self._think_end_id = think_end_id
        self._glue_ids = glue_ids
        self._phase = _Phase.ANSWER if think_end_id is None else _Phase.REASONING

    def mask(self) -> Bool[Tensor, " vocab"]:
        """True for each token that may come next."""
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
        """Take the token that came."""
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


def _line_ends(vocabulary: Vocabulary) -> frozenset[int]:
    tokens = set(range(vocabulary.vocab_size)) - vocabulary.special_ids
    return frozenset(i for i in tokens if set(vocabulary.token_bytes(i)) == {ord("\n")})


def _name(structured: StructuredOutput) -> str:
    """What the request calls it, for errors."""
    return structured.source or structured.kind


def _text(structured: StructuredOutput) -> str:
    """What was asked for, as text; its first, cheap check."""
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
