"""Shared code of the endpoints that generate: from fields of a body to the engine and back."""
