"""Strings and tokens: the family's vocabulary and its tokenizer."""

from nemotron3.text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
