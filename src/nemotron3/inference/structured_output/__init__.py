"""Structured output: answers that follow a JSON schema, an expression or a grammar."""
