"""Words that a learned vocabulary has in any case."""

import pytest

from nemotron3.errors import ConfigError
from nemotron3.text import Tokenizer
from nemotron3.text.vocabulary import CHAT_WORDS


def test_given_words_are_one_entry_each_and_leave_the_size_as_it_was():
    documents = ["the cat sat on the mat, and used a usable thing; " * 20]
    plain = Tokenizer.train(documents, vocab_size=360)
    worded = Tokenizer.train(documents, vocab_size=360, words=CHAT_WORDS)
    assert worded.vocab_size <= 360
    for word in CHAT_WORDS:
        assert len(worded.encode(word)) == 1
        assert worded.decode(worded.encode(word)) == word
    assert len(plain.encode("assistant")) > 1
    text = "<function=calc>\n<parameter=x>\n1\n</parameter>\n</function> the user's assistant"
    assert worded.decode(worded.encode(text)) == text


def test_a_word_that_is_learned_anyway_costs_nothing():
    documents = ["user user user assistant assistant assistant " * 50]
    plain = Tokenizer.train(documents, vocab_size=300)
    assert Tokenizer.train(documents, vocab_size=300, words=("user",)).encode("user") == (
        plain.encode("user")
    )


@pytest.mark.parametrize(
    ("words", "vocab_size", "said"),
    [
        (("two words",), 400, "words has 'two words', which is 2 pieces"),
        (("assistant",), 290, "vocab_size = 290 is below 296"),
    ],
)
def test_words_that_cannot_be_entries_are_refused(words, vocab_size, said):
    with pytest.raises(ConfigError, match=said):
        Tokenizer.train(["some text"], vocab_size=vocab_size, words=words)
