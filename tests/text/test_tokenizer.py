"""Tokenizer: round trips, the family's layout, files that transformers reads, bad files."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.errors import ConfigError, DataError
from nemotron3.text.tokenizer import Tokenizer
from nemotron3.text.vocabulary import SPECIAL_TOKEN_IDS, byte_characters, special_tokens

TEXT = (
    "To be, or not to be, that is the question:\n"
    "Whether 'tis nobler in the mind to suffer\n"
    "def area(width, height):\n    return width * height  # 1234\n"
)
CONVERSATION = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
SAMPLES = [
    "",
    "naïve café — 東京 🙂",
    "\x00\x01\ttabs\r\n\r\nand lines",
    "x = 1234567890",
    "HTTPServer.getValue(IOError)",
    CONVERSATION,
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT] * 3, vocab_size=350)


def test_layout_of_a_trained_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 350
    for token, token_id in SPECIAL_TOKEN_IDS.items():
        assert tokenizer.token_to_id(token) == token_id
    assert tokenizer.token_to_id("<SPECIAL_31>") == 31
    assert tokenizer.encode("\n") == [32 + ord("\n")]
    assert [tokenizer.token_to_id(c) for c in byte_characters()] == list(range(32, 288))


def test_special_ids_have_names(tokenizer):
    assert (tokenizer.unk_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 0, 1, 2)
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (10, 11)
    assert (tokenizer.think_start_id, tokenizer.think_end_id) == (12, 13)
    assert (tokenizer.tool_call_start_id, tokenizer.tool_call_end_id) == (14, 15)
    assert (tokenizer.tool_response_start_id, tokenizer.tool_response_end_id) == (16, 17)
    assert tokenizer.stop_ids == (2, 11)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    plain = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_a_token_and_nothing_is_added(tokenizer):
    assert tokenizer.encode("2026") == [32 + ord(digit) for digit in "2026"]


def test_special_tokens_in_documents_are_text(tokenizer):
    assert tokenizer.encode("</s>") == [tokenizer.eos_id]
    as_text = tokenizer.encode("</s>", parse_special=False)
    assert min(as_text) >= 32
    assert tokenizer.decode(as_text) == "</s>"
    assert tokenizer.encode_batch(["</s>"], parse_special=False) == [as_text]


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(SAMPLES) == [tokenizer.encode(text) for text in SAMPLES]


def test_decode_can_skip_special_tokens(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("mind"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<s>mind</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "mind"


@pytest.mark.parametrize("text", SAMPLES)
def test_byte_lengths_add_up(tokenizer, text):
    lengths = tokenizer.byte_lengths()
    ids = tokenizer.encode(text, parse_special=False)
    assert sum(lengths[i] for i in ids) == len(text.encode())
    assert lengths[tokenizer.eos_id] == 0


def test_training_is_deterministic_across_processes(tokenizer):
    script = (
        "from nemotron3.text.tokenizer import Tokenizer;"
        f"print(Tokenizer.train([{TEXT!r}] * 3, vocab_size=350).fingerprint)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == tokenizer.fingerprint


def test_save_and_load_keep_ids_settings_and_template(tokenizer, tmp_path):
    original = Tokenizer.train([TEXT], vocab_size=300)
    original.settings["eos_token"] = "<|im_end|>"
    original.chat_template = "{{ messages }}"
    original.save(tmp_path)
    loaded = Tokenizer.from_directory(tmp_path)
    assert loaded.fingerprint == original.fingerprint
    assert loaded.settings == original.settings
    assert loaded.chat_template == original.chat_template
    assert loaded.eos_id == 2
    assert [loaded.encode(text) for text in SAMPLES] == [original.encode(text) for text in SAMPLES]


def test_special_tokens_of_a_published_tokenizer_survive(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "first")
    file = tmp_path / "first" / "special_tokens_map.json"
    said = {
        "bos_token": {"content": "<s>", "lstrip": False, "normalized": False},
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<think>", "</think>"],
    }
    file.write_text(json.dumps(said))
    loaded = Tokenizer.from_directory(tmp_path / "first")
    loaded.save(tmp_path / "second")
    assert json.loads((tmp_path / "second" / file.name).read_text()) == said
    loaded.settings["eos_token"] = "<|im_end|>"
    loaded.save(tmp_path / "third")
    changed = json.loads((tmp_path / "third" / file.name).read_text())
    assert changed == said | {"eos_token": "<|im_end|>"}


def test_template_among_the_settings_is_found(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    content = json.loads(settings_file.read_text()) | {"chat_template": "{{ old }}"}
    settings_file.write_text(json.dumps(content))
    assert Tokenizer.from_directory(tmp_path).chat_template == "{{ old }}"


def test_transformers_reads_what_is_saved(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.bos_token_id == tokenizer.bos_id
    assert theirs.pad_token_id == tokenizer.pad_id
    for text in SAMPLES:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": {"type": "BPE", "vo', "not JSON"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"[]", "a JSON object was expected"),
        (b"{}", "no tokenizer"),
        (b'{"model": {"type": "Unigram2"}}', "no tokenizer"),
    ],
)
def test_damaged_file_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        Tokenizer.from_directory(tmp_path)
    assert "tokenizer.json" in str(raised.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_vocabulary_of_another_family_has_no_such_token(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<think>", "<muse>"))
    with pytest.raises(DataError, match="has no <think>"):
        _ = Tokenizer.from_directory(tmp_path).think_start_id


def test_sizes_that_cannot_be(tokenizer):
    with pytest.raises(ConfigError, match="vocab_size = 287 is below 288"):
        Tokenizer.train([TEXT], vocab_size=287)
    with pytest.raises(ConfigError, match="num_special_tokens = 17"):
        Tokenizer.train([TEXT], vocab_size=400, num_special_tokens=17)
    with pytest.raises(DataError, match="no documents"):
        Tokenizer.train([], vocab_size=400)


def test_little_text_gives_a_smaller_vocabulary_and_says_so(caplog):
    small = Tokenizer.train(["abab"], vocab_size=400)
    assert 288 < small.vocab_size < 400
    assert "400 were asked for" in caplog.text


def test_special_token_names_fill_the_slots():
    names = special_tokens(1000)
    assert len(set(names)) == 1000
    assert names[3] == "<SPECIAL_3>"
    assert names[12] == "<think>"
    assert names[999] == "<SPECIAL_999>"


def test_half_of_a_character_is_no_text():
    tokenizer = Tokenizer.train(["some text"], vocab_size=288)
    with pytest.raises(DataError, match=r"'a\\udcff' is no Unicode"):
        tokenizer.encode("a\udcff")
