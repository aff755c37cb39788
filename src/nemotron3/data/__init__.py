"""Text to batches: documents, token files, blends, and a loader whose state is a seed and counters."""
