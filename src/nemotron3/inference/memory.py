"""How many pages of keys and values an engine makes."""

from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.models.layout import MAX_STEPS
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.pattern import LayerKind
from nemotron3.parallel.devices import free_memory_bytes

_SHARE = 4
"""At most this part of the free memory is taken, where nobody says how much."""


def page_bytes(model: LanguageModel, config: EngineConfig) -> int:
    """Bytes of one page in all attention layers; 0 where there are none."""
    attention, pattern = model.config.attention, model.config.pattern
    if attention is None:
        return 0
    layers = pattern.main.count(LayerKind.ATTENTION)
    if config.max_draft_tokens != 0:
        layers += pattern.mtp.count(LayerKind.ATTENTION)
    per_token = 2 * attention.num_key_value_heads * attention.head_dim
    dtype = config.state.keys_dtype(model.activation_dtype or model.output_weight.dtype)
    return layers * config.page_size * per_token * dtype.itemsize


def num_pages(model: LanguageModel, config: EngineConfig, max_model_len: int) -> int:
    """As many as all sequences can use at their longest, within what may be taken."""
    size = page_bytes(model, config)
    if size == 0:
        return 0
    longest = -(-(max_model_len + MAX_STEPS) // config.page_size) + 1
    wanted = config.max_num_seqs * longest
    may_take = config.kv_cache_bytes
    if may_take is None:
        may_take = free_memory_bytes(model.device) // _SHARE
    pages = min(wanted, may_take // size)
    if pages < 2:
        raise ConfigError(
            f"{may_take} bytes for keys and values hold {pages} pages of {size} bytes; set "
            f"kv_cache_bytes to {2 * size} or more, or page_size to fewer than {config.page_size}"
        )
    return pages


def longest_sequence(config: EngineConfig, wanted: int, pages: int) -> int:
    """The most tokens that one sequence can have: what is wanted, as far as the pages hold it."""
    if pages == 0:
        return wanted
    # Drafts and a page that has to be copied before it is written need some room as well.
    held = (pages - 1) * config.page_size - MAX_STEPS
    if held >= wanted:
        return wanted
    if config.max_model_len is not None or held < 1:
        raise ConfigError(
            f"{pages} pages of {config.page_size} tokens hold sequences of {max(held, 0)} tokens, "
            f"not of {wanted}; set a larger kv_cache_bytes or a smaller max_model_len"
        )
    return held
