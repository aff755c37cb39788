"""Grammars compiled by `llguidance`: an Earley parser over a trie of the vocabulary.

Only this module imports the library. It has no other large imports, because every grammar is first
compiled in a separate process (`grammar_worker.py`): some grammars make the library overflow its
stack, which ends the process.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

from nemotron3.errors import ConfigError, DependencyMissingError

MAX_COMPILE_S = 5.0
"""Seconds that the first compilation of a grammar may take, in the worker process."""

_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}", "lenient": False}
_LIMITS = {"max_grammar_size": 200_000, "max_lexer_states": 50_000, "verbose_errors": False}


class GrammarLibrary:
    """Compiles grammars over one vocabulary.

    `tokens` are the bytes of each entry and `encode` tokenizes text. `vocab_size` is the model's,
    which may be larger than the vocabulary.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        *,
        special_ids: Iterable[int],
        stop_ids: Sequence[int],
        vocab_size: int,
        encode: Callable[[str], list[int]],
    ) -> None:
        self._lib = _llguidance()
        trie = _Trie(tokens, sorted(special_ids), stop_ids[0], encode)
        self._tokens = self._lib.LLTokenizer(trie, n_vocab=vocab_size, eos_token=list(stop_ids))
        self._limits = self._lib.LLParserLimits(**_LIMITS)

    def compile(self, kind: str, text: str) -> Any:
        """A matcher of the library; raises ConfigError if the text is not such a grammar."""
        matcher = self._lib.LLMatcher(
            self._tokens, self._grammar(kind, text), log_level=0, limits=self._limits
        )
        matcher.compute_bitmask()  # the first step may already exceed a limit
        if matcher.is_error():
            raise ConfigError(grammar_error(message_of(matcher)), field=kind)
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
            raise ConfigError(grammar_error(str(error)), field=kind) from error


class _Trie:
    """The vocabulary in the interface of llguidance."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_ids: list[int],
        eos_id: int,
        encode: Callable[[str], list[int]],
    ) -> None:
        self.eos_token_id = eos_id
        self.special_token_ids = special_ids
        self.tokens = list(tokens)
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode() if isinstance(text, bytes) else text)


def message_of(matcher: Any) -> str:
    """The error of a matcher, without the dump of its state."""
    return matcher.get_error().partition("\n<")[0]


def grammar_error(why: str) -> str:
    """The message of an error for a grammar that cannot be enforced."""
    return f"cannot be enforced: {why.strip()}; change it or leave it out"


def _llguidance() -> Any:
    try:
        return import_module("llguidance")
    except ImportError as error:
        raise DependencyMissingError(
            "structured output needs llguidance, which is not installed: "
            "pip install 'nemotron3[serve]'"
        ) from error
