"""The carried state of a model: its formats, its pages, and what each layer keeps between calls."""
