"""Named runs, each a Python function that returns the whole configuration."""
