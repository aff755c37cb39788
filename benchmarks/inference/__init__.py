"""Inference benchmarks: our server, llama.cpp's, and transformers, with the same weights."""
