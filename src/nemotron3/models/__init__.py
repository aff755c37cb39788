"""Nemotron-H language models: configuration, modules, and the published checkpoint layout."""
