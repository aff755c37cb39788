"""Temperature, min-p, top-k and top-p against a reference that sorts, and what is drawn."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemotron3.inference.sampling import candidates
from nemotron3.inference.sampling.candidates import Draw, draw, truncate
from nemotron3.ops.sampling.noise import gumbel, position_key


def draws(**fields):
    return Draw(**({"key": 0, "temperature": 1.0} | fields))


def reference(logits, row):
    """The tokens that may be drawn, by the definitions, in 64 bits; and how near a call it was."""
    weights = {
        token: math.exp((value - max(logits)) / row.temperature)
        for token, value in enumerate(logits)
    }
    kept = {token: weight for token, weight in weights.items() if weight >= row.min_p}
    # Nothing is above the most probable token, and it is as probable as itself, without rounding.
    margin = min([abs(weight - row.min_p) for weight in weights.values() if weight != 1] or [1.0])
    if row.top_k and row.top_k < len(logits):
        floor = sorted(weights.values(), reverse=True)[row.top_k - 1]
        kept = {token: weight for token, weight in kept.items() if weight >= floor}
    total = sum(kept.values())
    result = set()
    for token, weight in kept.items():
        above = sum(other for other in kept.values() if other > weight) / total
        margin = min(margin, abs(above - row.top_p)) if above else margin
        if above < row.top_p:
            result.add(token)
    return result, margin


rows = st.builds(
    draws,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


@settings(max_examples=200)
@given(
    table=st.lists(
        st.tuples(rows, st.lists(st.integers(-40, 40), min_size=12, max_size=12)),
        min_size=1,
        max_size=4,
    ),
)
def test_what_may_be_drawn_is_what_the_definitions_say(table):
    """Whole numbers over ten, so that many are equal."""
    logits = torch.tensor([values for _, values in table]) / 10
    expected = [
        reference(values, row)
        for (row, _), values in zip(table, logits.double().tolist(), strict=True)
    ]
    assume(all(margin > 1e-6 for _, margin in expected))
    kept = truncate(logits, [row for row, _ in table])
    for (row, _), line, values, (allowed, _) in zip(table, kept, logits, expected, strict=True):
        assert set((line > -torch.inf).nonzero().flatten().tolist()) == allowed
        places = sorted(allowed)
        assert line[places].equal(values[places] / row.temperature)


@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0, 30.0])
def test_top_p_of_a_large_vocabulary(top_p, spread):
    logits = spread * torch.randn(2, 5000, generator=torch.Generator().manual_seed(2))
    kept = truncate(logits, [draws(top_p=top_p), draws(top_p=1.0)])
    ordered, order = logits[0].double().softmax(-1).sort(descending=True)
    num_kept = int((ordered.cumsum(-1) - ordered < top_p - 1e-12).sum()) if spread else 5000
    found = set((kept[0] > -torch.inf).nonzero().flatten().tolist())
    differs = found ^ set(order[:num_kept].tolist())
    assert len(differs) <= num_kept / 1000, "but for rounding at the last ones"
    assert kept[1].equal(logits[1])


@pytest.mark.parametrize("block", [1, 2**11, 2**30])
def test_rows_are_drawn_a_block_at_a_time(block, monkeypatch):
    monkeypatch.setattr(candidates, "_BLOCK", block)
    logits = torch.randn(30, 700, generator=torch.Generator().manual_seed(3))
    many = [draws(key=position_key(4, 1, p)) for p in range(30)]
    keys = torch.tensor([row.key for row in many])
    scores = logits.double() + gumbel(keys[:, None], torch.arange(700))
    assert draw(logits, many).equal(scores.argmax(-1))


def test_equals_stay_or_go_together():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    for limit in ({"top_k": 2}, {"top_p": 0.1}):
        assert (truncate(logits, [draws(**limit)]) > -torch.inf).tolist() == [
            [False, True, True, True, False]
        ]


@pytest.mark.parametrize(
    "limit", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}]
)
def test_tokens_come_as_often_as_they_should(limit):
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0, 1.5])
    many = [draws(key=position_key(1, 0, p), **limit) for p in range(20_000)]
    counts = draw(logits.expand(len(many), -1), many).bincount(minlength=6).double()
    expected = truncate(logits[None], many[:1])[0].double().softmax(-1) * len(many)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 20.5  # exceeded once in a thousand seeds with 5 degrees of freedom


def test_what_is_drawn_does_not_depend_on_the_company():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 700, generator=generator)
    limits = [{}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.3, "top_p": 0.5}, {"top_p": 0.999}]
    many = [draws(key=position_key(p, 0, p), **limits[p % 5]) for p in range(9)]
    together = draw(logits, many)
    for p in range(9):
        assert draw(logits[p : p + 1], many[p : p + 1]) == together[p]


def test_rows_without_a_number_draw_nothing():
    logits = torch.tensor([[0.0, torch.nan], [-torch.inf, -torch.inf], [-torch.inf, 0.0]])
    assert draw(logits, [draws()] * 3).tolist() == [-1, -1, 1]
    assert draw(logits, [draws(top_k=1, top_p=0.5)] * 3).tolist() == [-1, -1, 1]
