"""Inference side by side: our server, llama.cpp's, and transformers, on the same weights."""
