"""Draws: every backend takes the token that exact noise for all of them would."""

import pytest
import torch

from nemotron3.ops.sampling import gumbel_argmax, logprobs_and_ranks
from nemotron3.ops.sampling import torch as torch_sampling
from nemotron3.ops.sampling.noise import position_key
from tests.ops.native import needs_compiler

BACKENDS = ["torch", pytest.param("native", marks=needs_compiler)]


def keys_of(count):
    keys = [position_key(4, 1, place) for place in range(count)]
    return torch.tensor(keys, dtype=torch.int64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 5.0, 1e6])
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 3001])
def test_no_winner_is_lost(backend, scale, vocab, monkeypatch):
    monkeypatch.setattr(torch_sampling, "_MANY", 4)
    generator = torch.Generator().manual_seed(vocab)
    logits = scale * torch.randn(300, vocab, generator=generator) + 30
    logits[::3, vocab // 3 :] = -torch.inf
    keys = keys_of(300)
    expected = gumbel_argmax(logits, keys, backend="reference")
    assert gumbel_argmax(logits, keys, backend=backend).equal(expected)
    wide = torch.full((300, vocab + 5), 1e9)
    wide[:, 2 : vocab + 2] = logits
    view = wide[:, 2 : vocab + 2]
    assert gumbel_argmax(view, keys, backend=backend).equal(expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rows_without_a_number_draw_nothing(backend):
    nothing, logits = -torch.inf, torch.zeros(4, 40)
    logits[0, 33] = torch.nan
    logits[1] = nothing
    logits[2] = nothing
    logits[2, 21] = -1e30
    drawn = gumbel_argmax(logits, keys_of(4), backend=backend).tolist()
    assert drawn[:3] == [-1, -1, 21]
    assert 0 <= drawn[3] < 40
    assert gumbel_argmax(logits[:0], keys_of(0), backend=backend).shape == (0,)


def test_few_are_looked_at_closely():
    logits, keys = torch.randn(200, 3000), keys_of(200)
    few = torch_sampling._likely(logits, keys).sum(-1).double().mean()
    assert few < 20, "it is to save work"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("vocab", [1, 15, 16, 1025, 131_072])
def test_scores_of_tokens(backend, scale, vocab, assert_close):
    generator = torch.Generator().manual_seed(vocab)
    logits = scale * torch.randn(7, vocab, generator=generator) - 3
    logits[::3, vocab // 2 + 1 :] = -torch.inf
    tokens = torch.randint(vocab // 2 + 1, (7,), generator=generator)
    expected = logprobs_and_ranks(logits, tokens, backend="reference")
    found = logprobs_and_ranks(logits, tokens, backend=backend)
    assert_close(found[0], expected[0], 1e-6)
    assert found[1].equal(expected[1])
    wide = torch.full((7, vocab + 5), 1e9)
    wide[:, 2 : vocab + 2] = logits
    view = logprobs_and_ranks(wide[:, 2 : vocab + 2], tokens, backend=backend)
    assert all(map(torch.equal, view, found))
