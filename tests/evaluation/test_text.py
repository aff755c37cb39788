"""Bits per byte of files."""

import hashlib
import math

import pytest
import torch

from nemotron3.data import FilesConfig
from nemotron3.errors import DataError
from nemotron3.evaluation.text import evaluate_text
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import Tokenizer
from tests.rl.playground import save_policy

TEXTS = ("say 3 up and then say 4 down", "up\ndown, é", "x")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = save_policy(tmp_path_factory.mktemp("policy") / "model")
    return LanguageModel.from_pretrained(folder).eval(), Tokenizer.from_directory(folder)


@torch.no_grad()
def by_hand(model, tokenizer, texts):
    nats = num_bytes = count = 0
    lengths = tokenizer.byte_lengths()
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
        nats -= sum(logprobs[i - 1, ids[i]].item() for i in range(1, len(ids)))
        num_bytes += sum(lengths[i] for i in ids[1:])
        count += len(ids) - 1
    return nats / math.log(2) / num_bytes, nats / count


def test_bits_are_those_of_the_models_own_probabilities(parts, tmp_path):
    for place, text in enumerate(TEXTS):
        (tmp_path / f"{place}.txt").write_text(text, encoding="utf-8")
    found = evaluate_text(*parts, FilesConfig(path=str(tmp_path)))
    bits, loss = by_hand(*parts, TEXTS)
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.num_documents == 3
    assert found.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.bad_rows == ""
    model, tokenizer = parts
    for text in TEXTS:
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        _, loss = by_hand(model, tokenizer, [text]) if len(text) > 1 else (0, None)
        count = len(tokenizer.encode(text))
        if loss is not None:
            bits = loss * count / math.log(2)
            assert found.by_document[key] == pytest.approx(bits / len(text.encode()), rel=1e-5)


def test_windows_cut_documents_and_lose_no_token(parts, tmp_path):
    (tmp_path / "a.txt").write_text("say 3 up and down " * 9)
    (tmp_path / "b.txt").write_text("up")
    files = FilesConfig(path=str(tmp_path))
    whole, cut = (evaluate_text(*parts, files, seq_len=length) for length in (512, 7))
    assert cut.num_tokens == whole.num_tokens
    assert cut.by_document.keys() == whole.by_document.keys()
    assert cut.bits_per_byte != whole.bits_per_byte
    for found in (whole, cut):
        assert all(0 < bits < 20 for bits in found.by_document.values())


def test_rows_that_are_none_are_counted(parts, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"said": "up and down"}\n' * 30 + '{"said": 3}\n')
    found = evaluate_text(*parts, FilesConfig(path=str(file), column="said"), seq_len=7)
    assert found.num_documents == 30
    assert found.bad_rows.startswith("1 not a string")


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "1 of 1 rows cannot be used: 1 empty"), ("x", "no held-out token follows another one")],
)
def test_text_with_nothing_to_predict_is_refused(parts, tmp_path, text, said):
    file = tmp_path / "short.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        evaluate_text(*parts, FilesConfig(path=str(file)))
