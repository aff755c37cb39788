"""Batches to weights: losses, optimizer, schedule, step, and the loop."""
