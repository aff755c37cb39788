r"""Answers that have to have a form: JSON of a schema, an expression, a choice, a grammar.

A grammar is compiled once and then says, before every token, which tokens can still lead to a whole
answer; the others are masked. `llguidance` does that: an Earley parser over a trie of the
vocabulary, tens of microseconds a token. This is the one file that knows it.

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
  not left out in silence. So is a grammar beyond `MAX_GRAMMAR_BYTES`; the automata behind have
  limits of their own, and an answer that meets one fails by itself.

    compiler = GrammarCompiler(tokenizer, style, vocab_size=131_072)
    constraint = compiler.constraint(
        StructuredOutput(kind="regex", value=r"\d+ km"), stop_ids=stop_ids, is_reasoning_open=False
    )
"""

import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from importlib import import_module
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from nemotron3.errors import ConfigError, DataError, DependencyMissingError
from nemotron3.inference.requests import StructuredOutput
from nemotron3.inference.vocabulary import ReasoningStyle, Vocabulary

MAX_GRAMMAR_BYTES = 256 * 1024
"""Longest schema, expression, list of choices or grammar, as text."""

_MAX_CACHED = 64
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}", "lenient": False}
_LIMITS = {"max_grammar_size": 200_000, "max_lexer_states": 50_000, "verbose_errors": False}


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
        self._lib = _llguidance()
        self._vocab_size = vocab_size
        self._tokens = self._lib.LLTokenizer(
            _Trie(vocabulary), n_vocab=vocab_size, eos_token=list(vocabulary.stop_ids)
        )
        self._limits = self._lib.LLParserLimits(**_LIMITS)
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
                "structured output needs a token that ends the answer and ignore_eos leaves none; "
                "leave out ignore_eos or give stop_token_ids"
            )
        key = (structured.kind, _text(structured))
        matcher = self._matcher(key)

        def renew() -> Any:
            return self._matcher(key, worn=matcher).deep_copy()

        return AnswerConstraint(
            matcher.deep_copy(),
            renew=renew,
            vocab_size=self._vocab_size,
            stop_ids=stop_ids,
            eos_ids=self._eos,
            think_end_id=self._end if is_reasoning_open else None,
            glue_ids=self._glue,
        )

    def _matcher(self, key: tuple[str, str], *, worn: Any = None) -> Any:
        with self._lock:
            matcher = self._compiled.get(key)
        if matcher is None or matcher is worn:
            matcher = self._compile(*key)  # nobody waits for it who wants another form
        with self._lock:
            self._compiled[key] = matcher
            self._compiled.move_to_end(key)
            while len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        return matcher

    def _compile(self, kind: str, text: str) -> Any:
        matcher = self._lib.LLMatcher(
            self._tokens, self._grammar(kind, text), log_level=0, limits=self._limits
        )
        matcher.compute_bitmask()  # the first step may be too complex already
        if matcher.is_error():
            raise ConfigError(_cannot_hold(kind, _message(matcher)))
        return matcher

    def _grammar(self, kind: str, text: str) -> str:
        matcher = self._lib.LLMatcher
        try:
            match kind:
                case "json_schema" | "json_object":
                    return matcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
                case "regex":
                    return matcher.grammar_from_regex(text)
                case "choice":
                    choices = " | ".join(json.dumps(choice) for choice in json.loads(text))
                    return matcher.grammar_from_lark(f"start: {choices}")
                case _:
                    return matcher.grammar_from_lark(text)
        except ValueError as error:
            raise ConfigError(_cannot_hold(kind, str(error))) from error


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
                "no token can continue the answer in the form that was asked for; "
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
                why = _message(self._matcher)
                raise DataError(f"the answer cannot be held to its form any further: {why}")
        return np.frombuffer(bits, dtype=np.uint8)


class _Trie:
    """The vocabulary as llguidance asks for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = vocabulary.stop_ids[0]
        self.special_token_ids = sorted(vocabulary.special_ids)
        self.tokens = [vocabulary.token_bytes(i) for i in range(vocabulary.vocab_size)]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return self._vocabulary.encode(text, parse_special=False)


def _llguidance() -> Any:
    try:
        return import_module("llguidance")
    except ImportError as error:
        raise DependencyMissingError(
            "structured output needs llguidance, which is not installed: "
            "pip install 'nemotron3[serve]'"
        ) from error


def _line_ends(vocabulary: Vocabulary) -> frozenset[int]:
    tokens = set(range(vocabulary.vocab_size)) - vocabulary.special_ids
    return frozenset(i for i in tokens if set(vocabulary.token_bytes(i)) == {ord("\n")})


def _text(structured: StructuredOutput) -> str:
    """What was asked for, as text; its first, cheap check."""
    kind, value = structured.kind, structured.value
    match kind:
        case "json_object":
            if value is not None:
                raise ConfigError(f"json_object takes no value, {value!r} was given; leave it out")
            return '{"type": "object"}'
        case "json_schema":
            text = _schema_text(value)
        case "choice":
            if not isinstance(value, list | tuple) or not value:
                raise ConfigError(f"choice is {value!r}; give a list of strings, one at least")
            choices = list(cast(Sequence[Any], value))
            if not all(isinstance(choice, str) and choice for choice in choices):
                raise ConfigError(f"choice is {choices!r}; every choice must be text, not empty")
            text = json.dumps(choices)
        case _:
            if not isinstance(value, str):
                raise ConfigError(f"{kind} is {value!r}; give it as text")
            text = value
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise ConfigError(
            f"{kind} takes {len(text.encode())} bytes; at most {MAX_GRAMMAR_BYTES} are compiled"
        )
    return text


def _schema_text(schema: Any) -> str:
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema is no JSON ({error}); give a JSON schema") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"json_schema is {text}; give an object ({{}} for any JSON value)")
    return text


def _message(matcher: Any) -> str:
    return matcher.get_error().partition("\n<")[0]  # after that the state, or that it is left out


def _cannot_hold(kind: str, why: str) -> str:
    return f"an answer cannot be held to this {kind}: {why.strip()}; change it or leave it out"
