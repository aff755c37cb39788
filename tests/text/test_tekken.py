"""The family's 131,072-entry vocabulary against id sequences of the published models."""

import json
import warnings
from importlib.util import find_spec

import pytest

from nemotron3.errors import DataError, DependencyMissingError
from nemotron3.text import tekken
from nemotron3.text.vocabulary import PRE_TOKENIZER_PATTERN

needs_package = pytest.mark.skipif(
    find_spec("mistral_common") is None, reason="mistral-common is not installed"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tekken.tekken_tokenizer()


@needs_package
def test_size_and_layout(tokenizer):
    assert tokenizer.vocab_size == 131_072
    assert tokenizer.encode("\n") == [1010]
    assert tokenizer.token_to_id("<SPECIAL_999>") == 999


@needs_package
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("What is 2+2?", [7493, 1395, 1032, 1050, 1043, 1050, 1063]),
        ("<|im_start|>assistant\n", [10, 1503, 19464, 1010]),
        ("system", [25708]),
    ],
)
def test_ids_of_the_published_models(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


@needs_package
def test_ids_equal_those_of_mistral_common(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own dependencies may warn
        oracle = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
        theirs = oracle.Tekkenizer.from_file(tekken._bundled_file())
    source = (tekken.__doc__ or "") + json.dumps({"a": [1.5e-3, "ünïcode", "東京🙂"]}, indent=4)
    for text in (source, source.upper(), source.replace(" ", "\n\t "), "  \n\n x\r\n" * 3):
        assert tokenizer.encode(text) == theirs.encode(text, bos=False, eos=False)


@needs_package
def test_our_cutting_rules_are_tekkens():
    pattern, _ = tekken._read_ranks(tekken._bundled_file())
    assert pattern == PRE_TOKENIZER_PATTERN


def test_missing_package_gives_the_install_line(monkeypatch):
    monkeypatch.setattr(tekken, "find_spec", lambda _: None)
    with pytest.raises(DependencyMissingError, match=r"pip install 'nemotron3\[tekken\]'"):
        tekken.tekken_tokenizer()


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"config": {"pattern": "x"}, "vocab": [{"token_bytes": "AA=="}]}'],
)
def test_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "tekken.json"
    file.write_text(content)
    with pytest.raises(DataError, match=r"tekken\.json"):
        tekken.tekken_tokenizer(file)
