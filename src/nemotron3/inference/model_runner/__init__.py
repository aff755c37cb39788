"""The model runner: forward passes, graphs, drafts, replacement of weights."""

from nemotron3.inference.model_runner.model_runner import ModelRunner

__all__ = ["ModelRunner"]
