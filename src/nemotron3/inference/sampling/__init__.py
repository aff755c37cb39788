"""Sampling: the choice of the next token, and the end of an answer."""
