"""The comparison transformer, measured like Nano."""

from benchmarks.gpu.inference.answers import section

SECTION = section("qwen3-moe", order=30, budget_s=110)
