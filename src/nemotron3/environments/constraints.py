"""Constraints on a text that a program can check, in the manner of IFEval.

A constraint knows three things: how to ask for it, whether a text keeps it, and with which
parameters a given text keeps it (`measure`; None where nothing worth asking for is true of the
text). With the third, tasks are made from their answer: a text is drawn first, then constraints
that it keeps. So any combination can be fulfilled, and a right answer is always at hand.

Words are runs of ASCII letters, sentences end with `.`, `!` or `?`, and lines are those that are
not blank.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Any

from nemotron3.environments.words import LETTERS, WORDS

Kwargs = Mapping[str, Any]
_TITLE = re.compile(r"<<[^<>\n]+>>")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_NUMBERED = re.compile(r"^(\d+)\. \S", re.MULTILINE | re.ASCII)
_NUMBER = re.compile(r"^\d+\. ", re.MULTILINE)


@dataclass(frozen=True)
class Constraint:
    """One kind of constraint; kinds of one `family` are not asked for together."""

    id: str
    family: str
    ask: Callable[[Kwargs], str]
    holds: Callable[[str, Kwargs], bool]
    measure: Callable[[str, Random], Kwargs | None]


def words(text: str) -> list[str]:
    """The words of a text."""
    return re.findall(r"[A-Za-z]+", text)


def lines(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line for line in text.splitlines() if line.strip()]


def sentences(text: str) -> list[str]:
    """The pieces that end with a mark; the dot of a list's number is none."""
    ended = re.split(r"[.!?]+", _NUMBER.sub("", text))[:-1]
    return [part for part in ended if words(part)]


def paragraphs(text: str) -> list[str]:
    """The pieces between blank lines."""
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def bullets(text: str) -> list[str]:
    """The lines that begin with `* ` or `- `."""
    return re.findall(r"^[*-] \S.*$", text, re.MULTILINE)


def occurrences(text: str, word: str) -> int:
    """How often a word occurs, in any case."""
    return sum(each.lower() == word for each in words(text))


def is_distinct(text: str) -> bool:
    """Whether no word occurs twice, in any case."""
    lowered = [word.lower() for word in words(text)]
    return len(lowered) == len(set(lowered))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _counted(
    id: str,
    noun: str,
    parts: Callable[[str], list[str]],
    *,
    family: str = "length",
    least: int = 2,
) -> Constraint:
    """As many parts as asked for, no more and no fewer."""

    def measure(text: str, random: Random) -> Kwargs | None:
        del random
        count = len(parts(text))
        return {"n": count} if count >= least else None

    return Constraint(
        id,
        family,
        lambda k: f"Write {_plural(k['n'], noun)}.",
        lambda text, k: len(parts(text)) == k["n"],
        measure,
    )


def _plain(
    id: str, family: str, ask: str, holds: Callable[[str], bool], *, relevant: str = ""
) -> Constraint:
    """A property without parameters; asked for where the text holds a `relevant` character."""

    def measure(text: str, random: Random) -> Kwargs | None:
        del random
        is_worth = not relevant or any(character in text for character in relevant)
        return {} if is_worth and holds(text) else None

    return Constraint(id, family, lambda _: ask, lambda text, _: holds(text), measure)


def _every_word(text: str, holds: Callable[[str], bool]) -> bool:
    found = words(text)
    return bool(found) and all(map(holds, found))


def _about(
    id: str,
    family: str,
    key: str,
    ask: str,
    holds: Callable[[str, Any], bool],
    candidates: Callable[[str, Random], list[Any]],
) -> Constraint:
    """A property with one parameter, drawn from those that the text has."""

    def measure(text: str, random: Random) -> Kwargs | None:
        found = candidates(text, random)
        return {key: random.choice(found)} if found else None

    return Constraint(
        id,
        family,
        lambda k: ask.format(k[key]),
        lambda text, k: holds(text, k[key]),
        measure,
    )


def _lower(text: str) -> list[str]:
    return [word.lower() for word in words(text)]


def _common_first_letter(text: str, random: Random) -> list[str]:
    del random
    first = {word[0] for word in _lower(text)}
    return list(first) if len(first) == 1 else []


def _word_lengths(text: str, random: Random) -> list[int]:
    del random
    lengths = {len(word) for word in words(text)}
    return list(lengths) if len(lengths) == 1 else []


def _avoided_letters(text: str, random: Random) -> list[str]:
    del random
    return [letter for letter in "aeiourstln" if letter not in text.lower()]


def _frequent_letters(text: str) -> list[tuple[str, int]]:
    low = text.lower()
    return [(letter, n) for letter in LETTERS if 2 <= (n := low.count(letter)) <= 4]


def _letter_frequency() -> Constraint:
    def measure(text: str, random: Random) -> Kwargs | None:
        found = _frequent_letters(text)
        if not found:
            return None
        letter, count = random.choice(found)
        return {"letter": letter, "n": count}

    return Constraint(
        "letters:frequency",
        "letters",
        lambda k: f"Use the letter {k['letter']} exactly {k['n']} times.",
        lambda text, k: text.lower().count(k["letter"]) == k["n"],
        measure,
    )


def _keyword_frequency() -> Constraint:
    def measure(text: str, random: Random) -> Kwargs | None:
        repeated = sorted({word for word in _lower(text) if occurrences(text, word) > 1})
        if not repeated:
            return None
        word = random.choice(repeated)
        return {"word": word, "n": occurrences(text, word)}

    return Constraint(
        "keywords:frequency",
        "keywords",
        lambda k: f"Use the word {k['word']} exactly {k['n']} times.",
        lambda text, k: occurrences(text, k["word"]) == k["n"],
        measure,
    )


def _capital_words(text: str) -> int:
    return sum(word.isupper() and len(word) > 1 for word in words(text))


def _some_capital_words(text: str, random: Random) -> list[int]:
    del random
    count = _capital_words(text)
    return [count] if 0 < count < len(words(text)) else []


def _is_numbered(text: str, count: int) -> bool:
    return _NUMBERED.findall(text) == [str(i + 1) for i in range(count)]


def _numbered_counts(text: str, random: Random) -> list[int]:
    del random
    count = len(_NUMBERED.findall(text))
    return [count] if count > 1 and _is_numbered(text, count) else []


def _ends(text: str, random: Random) -> list[str]:
    del random
    return [mark for mark in "!?." if text.rstrip().endswith(mark)]


def _first(text: str) -> str:
    return next(iter(_lower(text)), "")


def _last(text: str) -> str:
    return next(reversed(_lower(text)), "")


def _is_sorted(text: str) -> bool:
    found = _lower(text)
    return len(found) > 1 and found == sorted(found)


def _is_quoted(text: str) -> bool:
    said = text.strip()
    return len(said) > 2 and said[0] == said[-1] == '"' and said.count('"') == 2


def _is_title_case(text: str) -> bool:
    return _every_word(text, lambda word: word == word.capitalize())


QUANTITIES: tuple[Constraint, ...] = (
    _counted("length:number_words", "word", words, family="words", least=1),
    _counted("length:number_sentences", "sentence", sentences),
    _counted("length:number_lines", "line", lines),
    _counted("length:number_paragraphs", "paragraph", paragraphs),
    _counted("length:number_bullets", "bullet", bullets),
    _about(
        "length:numbered_list",
        "length",
        "n",
        "Write a numbered list of {} items.",
        _is_numbered,
        _numbered_counts,
    ),
)
"""How much is to be written: exact numbers. Every task has one of them."""

DISTINCT = _plain("words:distinct", "distinct", "Use no word twice.", is_distinct)

_OTHERS: tuple[Constraint, ...] = (
    _about(
        "length:at_most_words",
        "words",
        "n",
        "Write at most {} words.",
        lambda text, n: 0 < len(words(text)) <= n,
        lambda text, _: [len(words(text)) + more for more in range(3)],
    ),
    _about(
        "length:max_characters",
        "limits",
        "n",
        "Write at most {} characters.",
        lambda text, n: 0 < len(text.strip()) <= n,
        lambda text, _: [-(-len(text.strip()) // 10) * 10],
    ),
    _plain("case:lowercase", "case", "Use small letters only.", lambda t: t == t.lower()),
    _plain("case:uppercase", "case", "Use CAPITALS only.", lambda t: t == t.upper()),
    _plain("case:title", "case", "Begin every word with a capital.", _is_title_case),
    _about(
        "case:number_capital_words",
        "case",
        "n",
        "Write {} of the words in CAPITALS.",
        lambda text, n: _capital_words(text) == n,
        _some_capital_words,
    ),
    _about(
        "start:first_word",
        "start",
        "word",
        "Begin with the word {}.",
        lambda text, word: _first(text) == word,
        lambda text, _: [_first(text)],
    ),
    _about(
        "end:last_word",
        "end",
        "word",
        "End with the word {}.",
        lambda text, word: _last(text) == word,
        lambda text, _: [_last(text)],
    ),
    _about(
        "end:mark",
        "mark",
        "mark",
        "Let the last character be {}",
        lambda text, mark: text.rstrip().endswith(mark),
        _ends,
    ),
    _about(
        "letters:first_letter",
        "first_letter",
        "letter",
        "Begin every word with {}.",
        lambda text, letter: _every_word(text.lower(), lambda word: word[0] == letter),
        _common_first_letter,
    ),
    _about(
        "letters:avoid",
        "letters",
        "letter",
        "Do not use the letter {}.",
        lambda text, letter: bool(words(text)) and letter not in text.lower(),
        _avoided_letters,
    ),
    _letter_frequency(),
    _about(
        "words:length",
        "word_length",
        "n",
        "Use words of {} letters only.",
        lambda text, n: _every_word(text, lambda word: len(word) == n),
        _word_lengths,
    ),
    _about(
        "words:max_length",
        "word_length",
        "n",
        "Use no word longer than {} letters.",
        lambda text, n: _every_word(text, lambda word: len(word) <= n),
        lambda text, _: [max(map(len, words(text)), default=1)],
    ),
    _plain("words:sorted", "order", "Sort the words by the alphabet.", _is_sorted),
    _about(
        "keywords:include",
        "keywords",
        "word",
        "Use the word {}.",
        lambda text, word: occurrences(text, word) > 0,
        lambda text, _: sorted(set(_lower(text))),
    ),
    _about(
        "keywords:exclude",
        "exclude",
        "word",
        "Do not use the word {}.",
        lambda text, word: bool(words(text)) and occurrences(text, word) == 0,
        lambda text, random: [w for w in random.sample(WORDS, 3) if w not in _lower(text)],
    ),
    _keyword_frequency(),
    _plain(
        "punctuation:no_comma",
        "commas",
        "Use no comma.",
        lambda t: bool(words(t)) and "," not in t,
        relevant=".!?\n",
    ),
    _about(
        "punctuation:number_commas",
        "commas",
        "n",
        "Use {} commas.",
        lambda text, n: text.count(",") == n,
        lambda text, _: [text.count(",")] if text.count(",") > 1 else [],
    ),
    _plain(
        "punctuation:quoted",
        "quoted",
        'Put the whole answer in "quotes".',
        _is_quoted,
    ),
    _plain(
        "format:title",
        "title",
        "Put a title in <<double angles>> on the first line.",
        lambda t: bool(_TITLE.fullmatch(next(iter(lines(t)), "").strip())),
    ),
    _about(
        "format:placeholders",
        "placeholders",
        "n",
        "Put {} of the words in [brackets].",
        lambda text, n: len(_PLACEHOLDER.findall(text)) == n,
        lambda text, _: [n] if (n := len(_PLACEHOLDER.findall(text))) else [],
    ),
    _plain(
        "format:postscript",
        "postscript",
        "Begin the last line with P.S.",
        lambda t: len(lines(t)) > 1 and lines(t)[-1].lower().startswith("p.s. "),
    ),
    _plain(
        "format:separator",
        "separator",
        "Separate the parts by a line of three stars: ***",
        lambda t: [line.strip() for line in lines(t)].count("***") == 1,
    ),
)

CONSTRAINTS: Mapping[str, Constraint] = MappingProxyType(
    {each.id: each for each in (*QUANTITIES, DISTINCT, *_OTHERS)}
)
"""Every kind of constraint by its id."""

OTHERS: tuple[Constraint, ...] = _OTHERS
"""Those that are asked for beside a quantity."""
