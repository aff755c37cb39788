"""Token files of somebody else's making, used where they lie."""

import pytest

from nemotron3.data import (
    LoadTokenizerConfig,
    TokenFileWriter,
    TokenizedConfig,
    TokenizedSource,
    open_tokenized,
)
from nemotron3.errors import ConfigError, DataError
from nemotron3.text import Tokenizer

TEXTS = {
    "train": ["To be, or not to be.", "Once more \u2014 once."],
    "held_out": ["Who\u2019s there?"],
}


@pytest.fixture
def config(tmp_path):
    tokenizer = Tokenizer.train(TEXTS["train"], vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer")
    for split, texts in TEXTS.items():
        with TokenFileWriter(tmp_path / split, vocab_size=300) as writer:
            for text in texts:
                writer.add([*tokenizer.encode(text), tokenizer.eos_id])
    return TokenizedConfig(
        sources=(
            TokenizedSource(
                name="plays", train=str(tmp_path / "train"), held_out=str(tmp_path / "held_out")
            ),
        ),
        tokenizer=LoadTokenizerConfig(path=str(tmp_path / "tokenizer")),
    )


def test_text_and_sizes_come_back(config):
    corpus = open_tokenized(config)
    assert corpus.names == ("plays",)
    assert [d.text for d in corpus.held_out_documents("plays")] == TEXTS["held_out"]
    assert sorted(corpus.train_sample(max_bytes=1000)) == sorted(TEXTS["train"])
    source = corpus.manifest.source("plays")
    assert source.train.bytes == sum(len(text.encode()) for text in TEXTS["train"])
    assert source.held_out.documents == 1


def test_files_of_another_tokenizer_are_refused(config, tmp_path):
    with TokenFileWriter(tmp_path / "train", vocab_size=5000) as writer:
        writer.add([4000])
    with pytest.raises(DataError, match="holds token 4000, but the tokenizer has"):
        open_tokenized(config)


def test_a_file_without_documents_is_refused(config, tmp_path):
    with TokenFileWriter(tmp_path / "train", vocab_size=300):
        pass
    with pytest.raises(DataError, match="no documents"):
        open_tokenized(config)


def test_a_file_of_special_tokens_alone_is_refused(config, tmp_path):
    with TokenFileWriter(tmp_path / "held_out", vocab_size=300) as writer:
        writer.add([2, 2])
    with pytest.raises(DataError, match=r"held_out\.bin holds special tokens alone"):
        open_tokenized(config)


def test_sources_need_names_of_their_own(config):
    with pytest.raises(ConfigError, match="each by its own name"):
        TokenizedConfig(sources=config.sources * 2, tokenizer=config.tokenizer)
