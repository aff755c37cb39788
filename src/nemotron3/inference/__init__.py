"""Inference: `LLM` and `AsyncLLM`, requests and outputs, and the engine behind them."""
