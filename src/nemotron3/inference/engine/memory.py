"""The memory of an engine: prompt tokens of a step, and pages of keys and values.

Values that the configuration leaves open depend on the device. A GPU is assumed to serve only this
model, so nearly all of its free memory is used, as with vLLM's `gpu_memory_utilization`; the memory
of states, prefix cache and activations, which are allocated later, is subtracted first. The host's
memory is shared with other programs, so only a part of it is used.
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
from nemotron3.runtime.memory import MemoryPart

KEYS_AND_VALUES = "engine keys and values"
_SHARE, _GPU_SHARE = 0.25, 0.9
"""Largest share of the free memory that is used if `kv_cache_bytes` is not given."""
_LEAST_FREE = 1 / 8
"""Share of the free memory that counts as free beside mapped weights, however large these are: the
rest of them is read from the disk again and again, but an engine runs."""
_BATCHED_TOKENS, _GPU_BATCHED_TOKENS = 2048, 8192
_STEP_BYTES_PER_TOKEN = 384 * 1024
"""Reserved for the activations of each prompt token of a step: 3 GiB for 8192 tokens."""


def batched_tokens(config: EngineConfig, device: torch.device) -> int:
    """Most prompt tokens of one step."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    return _GPU_BATCHED_TOKENS if has_memory_of_its_own(device) else _BATCHED_TOKENS


def cache_bytes(
    model: LanguageModel, config: EngineConfig, device: torch.device, *, engines: int = 1
) -> int:
    """Bytes for keys and values where `kv_cache_bytes` is not given, of each of some `engines`."""
    # The system counts pages of files as free, and those of the weights are needed in each step.
    found = free_memory_bytes(device)
    free = max(found - model.mapped_bytes, int(found * _LEAST_FREE)) // engines
    least = int(free * _SHARE)
    if not has_memory_of_its_own(device):
        return least
    later = (
        _state_bytes(model, config)
        + config.prefix_cache_bytes
        + batched_tokens(config, device) * _STEP_BYTES_PER_TOKEN
    )
    return max(int(free * _GPU_SHARE) - later, least)  # `later` may exceed a small GPU's memory


def _state_bytes(model: LanguageModel, config: EngineConfig) -> int:
    """Bytes of all Mamba states; with drafts also of those after each token of a window."""
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
    """Bytes of one page, summed over all layers with keys and values; 0 if there are none."""
    itemsize = config.state.keys_dtype(model.compute_dtype).itemsize
    drafts = config.max_draft_tokens != 0
    return config.page_size * kv_bytes_per_token(model.config, itemsize=itemsize, with_mtp=drafts)


def num_pages(model: LanguageModel, config: EngineConfig, max_model_len: int) -> int:
    """Pages for all sequences at their greatest length, within the memory that may be used.

    Raises ConfigError if not even two pages fit.
    """
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


def engine_parts(
    model: LanguageModel, config: EngineConfig, device: torch.device, max_model_len: int
) -> list[MemoryPart]:
    """Upper bounds of what an engine on `device` keeps beside the weights; `model` needs no memory.

    Keys and values are those of `max_num_seqs` sequences of the greatest length; an engine makes do
    with fewer. A prompt's step counts where the device's memory is its own, as for `cache_bytes`.
    """
    longest = -(-(max_model_len + MAX_STEPS) // config.page_size) + 1
    pages = config.max_num_seqs * longest * page_bytes(model, config)
    if config.kv_cache_bytes is not None:
        pages = min(pages, config.kv_cache_bytes)
    prompts = min(batched_tokens(config, device), config.max_num_seqs * max_model_len)
    step = prompts * _STEP_BYTES_PER_TOKEN if has_memory_of_its_own(device) else 0
    sizes = {
        "engine states": _state_bytes(model, config),
        KEYS_AND_VALUES: pages,
        "engine prefix cache": config.prefix_cache_bytes if config.keeps_states else 0,
        "engine prompt step": step,
    }
    elastic = {KEYS_AND_VALUES, "engine prefix cache"}
    return [
        MemoryPart(name=name, num_bytes=size, is_estimate=True, is_elastic=name in elastic)
        for name, size in sizes.items()
    ]


def longest_sequence(config: EngineConfig, wanted: int, pages: int) -> int:
    """The most tokens of one sequence: `wanted`, or as many as the pages hold if that is less.

    Raises ConfigError if the configuration asks for a `max_model_len` that the pages do not hold.
    """
    if pages == 0:
        return wanted
    # Drafts need pages, and so does the copy of a shared page, which is made before it is written.
    held = (pages - 1) * config.page_size - MAX_STEPS
    if held >= wanted:
        return wanted
    if config.max_model_len is not None or held < 1:
        raise ConfigError(
            f"{pages} pages of {config.page_size} tokens hold sequences of {max(held, 0)} tokens, "
            f"not of {wanted}; set a larger kv_cache_bytes or a smaller max_model_len"
        )
    return held
