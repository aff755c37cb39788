"""Measuring models: environments, held-out text, public tasks, and the statistics to compare."""
