"""Structured output of a model that was not trained for it."""

import json
import random
import re

import pytest

from nemotron3.errors import ConfigError, DataError, DependencyMissingError
from nemotron3.inference.requests import SamplingParams, StructuredOutput
from nemotron3.inference.sampling.sampler import TokenChooser
from nemotron3.inference.structured_output import grammar_compiler, grammar_library
from nemotron3.inference.structured_output.grammar_compiler import (
    MAX_GRAMMAR_BYTES,
    GrammarCompiler,
)
from nemotron3.text.chat_style import CHAT_STYLES
from nemotron3.text.tokenizer import Tokenizer
from tests.inference.sampling.tables import write

TEXT = ['{"name": "Bob", "tags": [1, 2.5, true, null]}\n', "the rain in Köln 東京 🙂 20 km\n\n"]
VOCAB = 400  # more rows than entries, as published models have


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXT * 5, vocab_size=350)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, CHAT_STYLES["nano"], vocab_size=VOCAB)


def chooser(compiler, tokenizer, structured, *, is_reasoning_open=False, seed=0, **params):
    stop_ids = frozenset(tokenizer.stop_ids)
    return TokenChooser(
        SamplingParams(structured=structured, **params),
        prompt=(),
        seed=seed,
        index=0,
        stop_ids=stop_ids,
        vocab_size=VOCAB,
        constraint=compiler.constraint(
            structured, stop_ids=stop_ids, is_reasoning_open=is_reasoning_open
        ),
    )


def written(one, tokenizer, *, length=2000, **how):
    """The output of a model with random logits."""
    (ids,) = write([one], length, vocab=VOCAB, **how)
    is_whole = ids[-1] in tokenizer.stop_ids
    return tokenizer.decode(ids[:-1] if is_whole else ids), is_whole


CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "kind": {"enum": ["große", "klein", 3, None]},
        "size": {"type": "integer", "minimum": -5, "maximum": 300},
        "near": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
    },
    "required": ["name", "kind", "size"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "is_far": {"type": "boolean"}},
            "required": ["x", "is_far"],
            "additionalProperties": False,
        }
    },
}


def check_city(text):
    city = json.loads(text)
    assert {"name", "kind", "size"} <= set(city) <= {"name", "kind", "size", "near"}
    assert 1 <= len(city["name"]) <= 6
    assert city["kind"] in ("große", "klein", 3, None)
    assert type(city["size"]) is int
    assert -5 <= city["size"] <= 300
    for place in city.get("near", []):
        assert set(place) == {"x", "is_far"}
        assert isinstance(place["x"], int | float)
        assert isinstance(place["is_far"], bool)
    assert len(city.get("near", [])) <= 2


LIST = r"""
start: "<" item ("," item)* ">"
item: /[a-zä]{1,3}/ | start
"""


def check_list(text):
    depth = 0
    for character in text:
        depth += {"<": 1, ">": -1}.get(character, 0)
        assert depth >= 0
        assert character in "<>,ä" or character.islower()
    assert depth == 0


GRAMMARS = {
    "schema": (StructuredOutput(kind="json_schema", value=CITY), check_city),
    "schema as text": (StructuredOutput(kind="json_schema", value=json.dumps(CITY)), check_city),
    "object": (
        StructuredOutput(kind="json_object"),
        lambda text: pytest.fail(text) if not isinstance(json.loads(text), dict) else None,
    ),
    "regex": (
        StructuredOutput(kind="regex", value=r"(\d+ km|日本|[äöü]{2,4})(, \w)?"),
        lambda text: re.fullmatch(r"(\d+ km|日本|[äöü]{2,4})(, \w)?", text) or pytest.fail(text),
    ),
    "choice": (
        StructuredOutput(kind="choice", value=["Köln", "Kö", 'a "b"\n\\', "</think>", "🙂"]),
        lambda text: {"Köln", "Kö", 'a "b"\n\\', "</think>", "🙂"} & {text} or pytest.fail(text),
    ),
    "grammar": (StructuredOutput(kind="grammar", value=LIST), check_list),
}


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_complete_answer_follows_its_grammar(compiler, tokenizer, name, temperature):
    structured, check = GRAMMARS[name]
    num_whole = 0
    for seed in range(6):
        how = {"salt": seed, "head": seed + seed % 2, "drafts": seed % 3}
        one = chooser(compiler, tokenizer, structured, temperature=temperature, seed=seed)
        text, is_whole = written(one, tokenizer, length=600, **how)
        if is_whole:
            check(text)
            num_whole += 1
        assert "<|im_end|>" not in text
    assert num_whole >= 3, "most answers of this grammar are complete"


@pytest.mark.parametrize("name", GRAMMARS)
def test_speculation_changes_nothing(compiler, tokenizer, name):
    structured, _ = GRAMMARS[name]
    for seed in range(3):
        answers = {
            written(
                chooser(compiler, tokenizer, structured, is_reasoning_open=seed == 2, seed=seed),
                tokenizer,
                length=60,
                drafts=drafts,
                head=head,
            )
            for drafts, head in ((0, 0), (1, 0), (3, 0), (2, 1))
        }
        assert len(answers) == 1


def test_what_is_cut_off_can_still_be_completed(compiler, tokenizer):
    structured, _ = GRAMMARS["schema"]
    one = chooser(compiler, tokenizer, structured)
    text, is_whole = written(one, tokenizer, length=4)
    assert not is_whole
    assert text.startswith("{")


def test_reasoning_is_free_and_the_glue_stays(compiler, tokenizer):
    structured = StructuredOutput(kind="choice", value=["yes", "no"])
    constraint = compiler.constraint(
        structured, stop_ids=frozenset(tokenizer.stop_ids), is_reasoning_open=True
    )
    free = constraint.mask()
    assert (~free).nonzero().flatten().tolist() == sorted(tokenizer.stop_ids)
    for token in tokenizer.encode("no yes\n{"):
        constraint.accept(token)
        assert constraint.mask().equal(free)
    constraint.accept(tokenizer.think_end_id)
    first = set(constraint.mask().nonzero().flatten().tolist())
    line = tokenizer.encode("\n")[0]
    assert line in first
    assert {tokenizer.decode([token]).strip() for token in first} <= {
        "",
        "y",
        "ye",
        "yes",
        "n",
        "no",
    }
    straight = constraint.fork()
    constraint.accept(line)
    assert set(constraint.mask().nonzero().flatten().tolist()) == {
        token for token in first if tokenizer.decode([token]).strip()
    }
    for both in (straight, constraint):
        for token in tokenizer.encode("no"):
            both.accept(token)
        assert set(both.mask().nonzero().flatten().tolist()) == set(tokenizer.stop_ids)
        both.accept(tokenizer.im_end_id)
        assert set(both.mask().nonzero().flatten().tolist()) == set(tokenizer.stop_ids)


def test_a_line_end_that_the_grammar_wants_is_the_grammars(compiler, tokenizer):
    constraint = compiler.constraint(
        StructuredOutput(kind="regex", value="\n?k"),
        stop_ids=frozenset({2}),
        is_reasoning_open=True,
    )
    (line,), (letter,) = tokenizer.encode("\n"), tokenizer.encode("k")
    constraint.accept(tokenizer.think_end_id)
    constraint.accept(line)
    assert constraint.mask().nonzero().flatten().tolist() == [letter]


def test_styles_without_a_line_end_have_no_glue(tokenizer):
    compiler = GrammarCompiler(tokenizer, CHAT_STYLES["ultra"], vocab_size=VOCAB)
    constraint = compiler.constraint(
        StructuredOutput(kind="regex", value="a"), stop_ids=frozenset({2}), is_reasoning_open=True
    )
    constraint.accept(tokenizer.think_end_id)
    assert constraint.mask().nonzero().flatten().tolist() == tokenizer.encode("a")


def test_the_end_may_come_exactly_when_the_answer_is_whole(compiler, tokenizer):
    stop = tokenizer.encode("k")[0]
    stop_ids = frozenset({tokenizer.im_end_id, stop})
    constraint = compiler.constraint(
        StructuredOutput(kind="regex", value="k?ab?"), stop_ids=stop_ids, is_reasoning_open=False
    )

    def allowed():
        return set(constraint.mask().nonzero().flatten().tolist())

    assert allowed() == set(tokenizer.encode("a"))  # not k, which would end it here
    constraint.accept(tokenizer.encode("a")[0])
    assert allowed() == {*tokenizer.encode("b"), *stop_ids}
    constraint.accept(tokenizer.encode("b")[0])
    assert allowed() == stop_ids
    with pytest.raises(ConfigError, match="leave out ignore_eos"):
        compiler.constraint(
            StructuredOutput(kind="json_object"), stop_ids=frozenset(), is_reasoning_open=False
        )


def test_special_tokens_match_no_text(compiler, tokenizer):
    for kind, value in (
        ("regex", "(.|\n)*"),
        ("json_schema", {"type": "string"}),
        ("choice", ["<think>", "</s>", "<|im_end|>"]),
    ):
        constraint = compiler.constraint(
            StructuredOutput(kind=kind, value=value),
            stop_ids=frozenset({11}),
            is_reasoning_open=False,
        )
        if kind == "json_schema":
            constraint.accept(tokenizer.encode('"')[0])
        found = set(constraint.mask().nonzero().flatten().tolist())
        assert found & tokenizer.special_ids <= {11}
        assert max(found) < tokenizer.vocab_size, "rows beyond the vocabulary stand for nothing"
    named = compiler.constraint(
        StructuredOutput(kind="grammar", value='start: <tool_call> "a"'),
        stop_ids=frozenset({11}),
        is_reasoning_open=False,
    )
    assert named.mask().nonzero().flatten().tolist() == [tokenizer.tool_call_start_id]


def test_white_space_in_json_has_an_end(compiler, tokenizer):
    constraint = compiler.constraint(
        StructuredOutput(kind="json_object"), stop_ids=frozenset({11}), is_reasoning_open=False
    )
    constraint.accept(tokenizer.encode("{")[0])
    blank = tokenizer.encode(" ")[0]
    for _ in range(40):
        assert constraint.mask()[blank]
        constraint.accept(blank)
    assert not constraint.mask()[blank]


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"type": "fruit"}, "fruit"),
        ("json_schema", {"$ref": "#/nowhere"}, "nowhere"),
        ("json_schema", {"$ref": "http://127.0.0.1/schema"}, "does not fetch"),
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "null"}]}, "incompatible"),
        ("json_schema", {"type": "string", "format": "poem"}, "poem"),
        ("json_schema", "{", "not JSON"),
        ("json_schema", [1], r"give an object \({}"),
        ("json_schema", None, "give an object"),
        ("json_schema", {"const": float("nan")}, "not JSON"),
        ("json_schema", {"type": {1, 2}}, "not JSON"),
        ("json_object", {"type": "object"}, "leave it out"),
        ("regex", "(((", "unclosed group"),
        ("regex", "(?=a)b", "(?i)look"),
        ("regex", 3, "as a string"),
        ("regex", "a" * (MAX_GRAMMAR_BYTES + 1), "at most"),
        ("choice", [], "one or more"),
        ("choice", "yes", "list of one or more strings"),
        ("choice", ["a", ""], "non-empty"),
        ("choice", ["a", 1], "non-empty string"),
        ("grammar", "start: nothing", "nothing"),
        ("grammar", 'begin: "a"', "start"),
        ("grammar", None, "as a string"),
    ],
)
def test_a_grammar_that_cannot_be_enforced_is_an_error(compiler, kind, value, why):
    with pytest.raises(ConfigError, match=why):
        compiler.constraint(
            StructuredOutput(kind=kind, value=value),
            stop_ids=frozenset({2}),
            is_reasoning_open=False,
        )


def test_deep_schemas_end_in_an_error(compiler):
    schema = {"type": "integer"}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(ConfigError):
        compiler.constraint(
            StructuredOutput(kind="json_schema", value=schema),
            stop_ids=frozenset({2}),
            is_reasoning_open=False,
        )


def test_a_grammar_that_leads_nowhere_fails_the_answer(compiler):
    constraint = compiler.constraint(
        StructuredOutput(kind="grammar", value='start: <|im_end|> "a"'),
        stop_ids=frozenset({11}),
        is_reasoning_open=False,
    )
    with pytest.raises(DataError, match="no token can continue"):
        constraint.mask()


def test_answers_of_one_grammar_do_not_notice_each_other(compiler, tokenizer):
    structured = StructuredOutput(kind="regex", value="[ab]+")
    first, second = (
        compiler.constraint(structured, stop_ids=frozenset({2}), is_reasoning_open=False)
        for _ in range(2)
    )
    before = second.mask()
    for token in tokenizer.encode("abba"):
        first.accept(token)
    assert second.mask().equal(before)
    assert first.mask()[2]
    assert not before[2]


WEARING = r"(ab|ba)*(a|b)*a(a|b){12}( k)?"


def test_a_grammar_in_long_use_does_not_wear_out(tokenizer, monkeypatch):
    """Copies share an automaton that grows until it fails; it must be renewed."""
    monkeypatch.setitem(grammar_library._LIMITS, "max_lexer_states", 200)
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB)
    structured, compiled = StructuredOutput(kind="regex", value=WEARING), []
    for seed in range(12):
        one = chooser(compiler, tokenizer, structured, seed=seed)
        text, is_whole = written(one, tokenizer, drafts=seed % 3, salt=seed)
        assert is_whole
        assert re.fullmatch(WEARING, text)
        matcher = compiler._compiled[("regex", WEARING)]
        if matcher not in compiled:
            compiled.append(matcher)
    assert len(compiled) > 1, "it was compiled anew, or the test tests nothing"


def test_a_grammar_beyond_its_limits_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setitem(grammar_library._LIMITS, "max_lexer_states", 10)
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="too many states"):
        chooser(compiler, tokenizer, StructuredOutput(kind="regex", value="([a-z]{3,9}x|y)*a"))


def test_an_answer_beyond_the_limits_fails_by_itself(tokenizer, monkeypatch):
    monkeypatch.setitem(grammar_library._LIMITS, "max_lexer_states", 40)
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB)
    structured = StructuredOutput(kind="regex", value=WEARING)
    for seed in range(20):
        one = chooser(compiler, tokenizer, structured, seed=seed)
        try:
            written(one, tokenizer, length=40, salt=seed)
        except AssertionError:
            assert "exceeds a limit of its grammar" in (one.error or "")
            return
    pytest.fail("no answer met the limit, so nothing was tested")


def test_the_grammars_kept_are_those_used_last(tokenizer, monkeypatch):
    monkeypatch.setattr(grammar_compiler, "_MAX_CACHED", 3)
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB)
    used = random.Random(0).choices(range(6), k=60)
    for i, number in enumerate(used):
        compiler.constraint(
            StructuredOutput(kind="regex", value=f"a{{{number + 1}}}"),
            stop_ids=frozenset({2}),
            is_reasoning_open=False,
        )
        last = list(dict.fromkeys(reversed(used[: i + 1])))[:3]
        assert list(compiler._compiled) == [("regex", f"a{{{n + 1}}}") for n in reversed(last)]


def test_the_install_line_is_in_the_error(tokenizer, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(grammar_library, "import_module", missing)
    with pytest.raises(DependencyMissingError, match=r"pip install 'nemotron3\[serve\]'"):
        GrammarCompiler(tokenizer, vocab_size=VOCAB)
