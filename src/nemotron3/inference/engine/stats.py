"""What an engine counts."""

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Counts of an engine's work so far, and its current load."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    """Share of the pages that running sequences use; pages of the prefix cache count as free."""
    prefix_bytes: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    """Prompt tokens found in the prefix cache."""
    prompt_tokens: int = 0
    """Prompt tokens prefilled, without those found in the prefix cache."""
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    draft_length: int = 0

    def count_prefix(self, tokens: int, hits: int) -> None:
        """Count the first look of a sequence into the prefix cache."""
        self.prefix_queries += tokens
        self.prefix_hits += hits
