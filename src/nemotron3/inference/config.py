"""The limits of an engine: sequences, tokens of a step, memory, drafts."""

from dataclasses import dataclass, field

from nemotron3.errors import ConfigError
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.ops.weights import ActivationFormat


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine's limits. None stands for a value chosen for the model and the machine."""

    max_num_seqs: int = 32
    """Sequences that run at the same time."""
    max_num_waiting: int = 256
    """Answers that may wait to be scheduled; further requests are refused."""
    max_num_batched_tokens: int | None = None
    """Most prompt tokens of one step; longer prompts are prefilled in chunks, between the decoding
    steps of other sequences. None for 8192 on a GPU, which fewer would not fill, 2048 elsewhere."""
    max_model_len: int | None = None
    """Most tokens of prompt and answer together; None for the model's own limit."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values. None for as much as `max_num_seqs` sequences of the greatest
    length need, up to a bound. On a GPU the bound is nine tenths of the memory that the weights
    leave free, minus the states, the prefix cache and the activations of a step, but at least a
    quarter of the free memory; elsewhere it is a quarter of the free memory."""
    page_size: int = 64
    """Tokens per page of keys and values."""
    prefix_cache_bytes: int = 1 << 30
    """Memory for the states of the prefix cache; 0 turns it off."""
    prefix_interval: int = 512
    """Tokens between the lengths of a prompt at which its state is cached, besides the ends of its
    messages; a length shortly after another one is left out."""
    max_draft_tokens: int | None = None
    """Most tokens drafted in a step by multi-token prediction, 0 for none; None for 3 if the model
    has an MTP block. The actual number adapts to acceptance and batch size."""
    adapts_drafts: bool = True
    """Whether the number of drafts adapts to measured acceptance and cost; if not, it is always
    `max_draft_tokens`."""
    return_routed_experts: bool = False
    """Whether answers have the experts that each MoE layer chose for each token, so that a training
    pass can replay them. Prompts then do not use the prefix cache, whose states have no experts."""
    seed: int = 0
    """Seed of the generator of seeds for requests without one."""
    state: StatePrecision = field(default_factory=StatePrecision)
    """Number formats of keys, values and SSM states."""

    activations: ActivationFormat | None = None
    """What products with matrices in int8 and NVFP4 round their activations to: int8 is faster on a
    CPU and changes answers a little (models/rounded_activations.py). None for nothing. The model
    that the engine is given stays as it is, and its tensors are shared."""

    @property
    def keeps_states(self) -> bool:
        """Whether states are shared: cached prefixes, and one prompt for several answers."""
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
