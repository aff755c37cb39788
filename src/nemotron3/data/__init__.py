"""Text to batches: documents, token files, blends, and a loader that is a seed and counters."""
