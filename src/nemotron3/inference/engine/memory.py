"""How many tokens an engine reads at a time, and how many pages of keys and values it makes.

Where nobody says, the device decides. A GPU is there for the model alone: nearly all of its memory
is taken, as vLLM does (`gpu_memory_utilization`), but for what comes later, which is counted first.
Other memory is shared with everything else that runs on the machine, and little of it is taken.
"""

import torch

from nemotron3.errors import ConfigError
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.model_runner.speculative import most_drafts
from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.models.costs import kv_bytes_per_token
from nemotron3.models.layout import MAX_STEPS
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.runtime.devices import free_memory_bytes, has_memory_of_its_own

_SHARE, _GPU_SHARE = 0.25, 0.9
"""At most this part of the free memory is taken, where nobody says how much."""
_BATCHED_TOKENS, _GPU_BATCHED_TOKENS = 2048, 8192
_STEP_BYTES_PER_TOKEN = 384 * 1024
"""Left for the activations of a token of a prompt: 3 GiB for 8192 of them."""


def batched_tokens(config: EngineConfig, device: torch.device) -> int:
    """Prompt tokens read in one step."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    return _GPU_BATCHED_TOKENS if has_memory_of_its_own(device) else _BATCHED_TOKENS


def cache_bytes(model: LanguageModel, config: EngineConfig, device: torch.device) -> int:
    """Memory for keys and values where nobody says how much."""
    free = free_memory_bytes(device)
    least = int(free * _SHARE)
    if not has_memory_of_its_own(device):
        return least
    later = (
        _state_bytes(model, config)
        + config.prefix_cache_bytes
        + batched_tokens(config, device) * _STEP_BYTES_PER_TOKEN
    )
    return max(int(free * _GPU_SHARE) - later, least)  # a small GPU holds no large step


def _state_bytes(model: LanguageModel, config: EngineConfig) -> int:
    """Of what is kept of each sequence; with drafts also after each token of a window."""
    cache = HybridCache(
        model.config,
        slots=config.max_num_seqs,
        dtype=model.compute_dtype,
        device=torch.device("meta"),
        pages=0,
        precision=config.state,
    )
    drafts = most_drafts(model, config.max_draft_tokens)
    return cache.state_nbytes * (1 + (1 + drafts if drafts else 0))


def page_bytes(model: LanguageModel, config: EngineConfig) -> int:
    """Bytes of one page in all layers that keep something of each token; 0 where there are none."""
    itemsize = config.state.keys_dtype(model.compute_dtype).itemsize
    drafts = config.max_draft_tokens != 0
    return config.page_size * kv_bytes_per_token(model.config, itemsize=itemsize, with_mtp=drafts)


def num_pages(model: LanguageModel, config: EngineConfig, max_model_len: int) -> int:
    """As many as all sequences can use at their longest, within what may be taken."""
    size = page_bytes(model, config)
    if size == 0:
        return 0
    longest = -(-(max_model_len + MAX_STEPS) // config.page_size) + 1
    wanted = config.max_num_seqs * longest
    may_take = config.kv_cache_bytes
    if may_take is None:
        may_take = cache_bytes(model, config, model.device)
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
