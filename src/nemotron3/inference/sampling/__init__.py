"""Sampling: which token comes next, and what ends an answer."""
