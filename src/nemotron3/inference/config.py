"""How much an engine may hold and do at a time."""

from dataclasses import dataclass, field

from nemotron3.errors import ConfigError
from nemotron3.models.cache.state_precision import StatePrecision


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine's limits. None means what fits the model and the machine."""

    max_num_seqs: int = 32
    """Sequences that run at the same time."""
    max_num_waiting: int = 256
    """Answers that may wait for their turn; beyond that requests are refused."""
    max_num_batched_tokens: int | None = None
    """Prompt tokens read in one step; longer prompts are read in chunks, between others' steps.
    None for 8192 on a GPU, which fewer do not fill, and 2048 elsewhere."""
    max_model_len: int | None = None
    """Most tokens of prompt and answer together; None for the model's own limit."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values; None for what `max_num_seqs` long sequences want, at most nine
    tenths of a GPU's memory that weights leave free, less what states, kept prefixes and a step
    take of it; a quarter of what is free elsewhere, and at least."""
    page_size: int = 64
    """Tokens of a page of keys and values."""
    prefix_cache_bytes: int = 1 << 30
    """Memory for states kept for prompts that begin alike; 0 keeps none."""
    prefix_interval: int = 512
    """A state is kept whenever a prompt has been read this far, and at its messages' ends; not
    where another one ends just before."""
    max_draft_tokens: int | None = None
    """Most tokens drafted ahead by multi-token prediction, 0 for none; None for 3 where the model
    can. How many are drafted in a step depends on what is accepted and on the batch."""
    adapts_drafts: bool = True
    """Whether the number of drafts follows what they bring; else it is always the most."""
    return_routed_experts: bool = False
    """Whether answers come with the experts that each mixture chose for each token, to be chosen
    again by a training pass. Prompts are then read whole: what is kept of earlier ones has none."""
    seed: int = 0
    """Seed of the seeds that requests without one get."""
    state: StatePrecision = field(default_factory=StatePrecision)
    """What keys, values and the scan's states are kept in."""

    @property
    def keeps_states(self) -> bool:
        """Whether a state may serve another answer than the one it was computed for."""
        return not self.return_routed_experts

    def __post_init__(self) -> None:
        bounds = {
            "max_num_seqs": 1,
            "max_num_waiting": 0,
            "max_num_batched_tokens": 1,
            "max_model_len": 1,
            "kv_cache_bytes": 1,
            "page_size": 1,
            "prefix_cache_bytes": 0,
            "prefix_interval": 1,
            "max_draft_tokens": 0,
        }
        for name, least in bounds.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"is {value}; it must be {least} or more", field=name)
