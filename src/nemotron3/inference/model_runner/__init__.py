"""Execution of the model: forward passes, graphs, drafts, weights."""

from nemotron3.inference.model_runner.model_runner import ModelRunner

__all__ = ["ModelRunner"]
