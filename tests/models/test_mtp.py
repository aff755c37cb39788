"""The draft block with a part of its outputs."""

import pytest
import torch

from nemotron3.models.cache.attention_state import AttentionState
from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.models.layout import SequenceLayout
from nemotron3.ops.segments import Segments
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import DECODE

BLOCKS = ["*E", "E*", "**E", "E*E-", "E", "-E"]
every_block = pytest.mark.parametrize("block", BLOCKS)
LENGTHS = (11, 6)


def model_and_cache(block):
    model = tiny_model(tiny_config(f"ME/{block}"))
    cache = HybridCache(
        model.config, slots=2, dtype=torch.float32, device=model.device, page_size=4, drafts=True
    )
    for slot in range(2):
        cache.reserve(slot, 32)
    return model, cache


def inputs(lengths, cached_lengths=(0, 0)):
    """Embeddings and hidden states of some tokens of two sequences, and their layout."""
    width, whole = tiny_config().hidden_size, 32
    chance = torch.Generator().manual_seed(0)
    both = torch.randn(2, 2, whole, width, generator=chance)
    spans = [slice(old, old + new) for old, new in zip(cached_lengths, lengths, strict=True)]
    embedding, hidden = (torch.cat([row[span] for row, span in zip(kind, spans, strict=True)])
                         for kind in both)  # fmt: skip
    layout = SequenceLayout(Segments(lengths), cached_lengths=tuple(cached_lengths), slots=(1, 0))
    return embedding, hidden, layout


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("wanted", [[2], [16, 0], []])
@every_block
@torch.no_grad()
def test_chosen_tokens_have_the_outputs_they_have_among_all(assert_close, block, wanted):
    rows = torch.tensor(wanted, dtype=torch.int64)
    model, cache = model_and_cache(block)
    whole, _ = model.mtp(*inputs(LENGTHS), cache.draft_layers)
    some, _ = model.mtp(*inputs(LENGTHS), cache.draft_layers, output_indices=rows)
    assert_close(some, whole[rows], DECODE)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("parts", [[LENGTHS], [(4, 3), (1, 2), (6, 1)], [(1, 1), (10, 5)]])
@every_block
@torch.no_grad()
def test_reading_leaves_what_a_whole_pass_leaves(assert_close, block, parts):
    """The same keys and values, at once or in parts, and the outputs that follow from them."""
    model, whole = model_and_cache(block)
    model.mtp(*inputs(LENGTHS), whole.draft_layers)
    _, read = model_and_cache(block)
    cached_lengths = (0, 0)
    for part in parts:
        model.mtp.read(*inputs(part, cached_lengths), read.draft_layers)
        cached_lengths = tuple(old + new for old, new in zip(cached_lengths, part, strict=True))
    after = [model.mtp(*inputs((2, 2), LENGTHS), cache.draft_layers)[0] for cache in (whole, read)]
    assert_close(*after, DECODE)
    remembering = [s for s in read.draft_layers if isinstance(s, AttentionState)]
    assert len(remembering) == block.count("*")
    assert all(state.keys.any() for state in remembering)
