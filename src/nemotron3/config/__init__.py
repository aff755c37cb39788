"""The record of a run: configuration to JSON and back, and units of duration."""
