"""A tokenizer and a model that share a vocabulary, for tests of text."""

import functools

from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import Tokenizer
from tests.tiny import tiny_config, tiny_model

_TEXT = [
    "the quick brown fox jumps over the lazy dog. To be, or not to be: that is the question.\n"
    "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\nüñíçødé 😀\n"
] * 3


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(_TEXT, vocab_size=420, min_frequency=1)


@functools.cache
def text_model(pattern: str = "MEM*E/*E") -> LanguageModel:
    return tiny_model(tiny_config(pattern, vocab_size=tokenizer().vocab_size + 3, eos_token_id=2))
