"""Baselines: against a slow and plain n-gram model, and against what is known of the text."""

import gzip
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.data.baselines import BaselinesConfig, _ngram_bits, baseline_bits_per_byte
from nemotron3.errors import ConfigError, DataError


def slow_bits(train, test, order):
    """Witten-Bell by its definition, one byte and one dictionary at a time."""
    counts = {}
    for document in train:
        for place, byte in enumerate(document):
            for length in range(min(place, order - 1) + 1):
                context = document[place - length : place]
                followers = counts.setdefault(context, {})
                followers[byte] = followers.get(byte, 0) + 1
    total = 0.0
    for document in test:
        for place, byte in enumerate(document):
            probability = 1 / 256
            for length in range(min(place, order - 1) + 1):
                followers = counts.get(document[place - length : place], {})
                if followers:
                    seen, kinds = sum(followers.values()), len(followers)
                    count = followers.get(byte, 0)
                    probability = (count + kinds * probability) / (seen + kinds)
            total -= math.log2(probability)
    return total / sum(map(len, test))


documents = st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=6)
few_letters = st.lists(
    st.lists(st.sampled_from(b"\x00ab\xff"), min_size=1, max_size=40).map(bytes),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(train=documents | few_letters, test=documents | few_letters, order=st.integers(1, 7))
def test_ngram_equals_its_definition(train, test, order):
    bits = _ngram_bits(train, test, order)
    assert len(bits) == order
    assert bits[-1] == pytest.approx(slow_bits(train, test, order), rel=1e-9)
    assert bits[0] == pytest.approx(slow_bits(train, test, 1), rel=1e-9)


def test_random_bytes_cost_eight_bits():
    noise = np.random.default_rng(0).integers(0, 128, 200_000).astype(np.uint8).tobytes().decode()
    bits = baseline_bits_per_byte([noise[:100_000]], [noise[100_000:]])
    assert bits["unigram"] == pytest.approx(7, abs=0.01)
    assert 6.9 < bits["gzip"] < 7.2
    assert bits["6-gram"] > 6.9


def test_what_was_seen_before_is_cheap():
    words = random.Random(0)
    text = " ".join(f"{words.choice('abcdefgh')}{words.randrange(10**6)}" for _ in range(3000))
    bits = baseline_bits_per_byte([text], [text])
    assert set(bits) == {"unigram", "6-gram", "gzip", "xz", "xz after train"}
    assert bits["xz after train"] < 0.05 < 3 < bits["xz"]
    assert bits["6-gram"] < 1 < 3 < bits["unigram"]
    assert bits["gzip"] == pytest.approx(
        8 * len(gzip.compress(text.encode())) / len(text), rel=0.01
    )


def test_more_context_helps_on_text():
    text = "the cat sat on the mat and the dog sat on the log. " * 40
    bits = _ngram_bits([text.encode()], [text[:500].encode()], 5)
    assert bits == sorted(bits, reverse=True)


def test_training_text_is_capped():
    small = BaselinesConfig(train_bytes=100, order=3)
    capped = baseline_bits_per_byte(["a" * 60, "b" * 60], ["ab"], small)
    assert capped["3-gram"] == baseline_bits_per_byte(["a" * 60, "b" * 40], ["ab"], small)["3-gram"]
    assert capped["3-gram"] != baseline_bits_per_byte(["a" * 60, "b" * 60], ["ab"])["6-gram"]


@pytest.mark.parametrize(
    ("train", "test"), [([], ["a"]), (["a"], []), ([""], ["a"]), (["a"], [""])]
)
def test_no_text_is_an_error(train, test):
    with pytest.raises(DataError, match="one of them is empty"):
        baseline_bits_per_byte(train, test)


@pytest.mark.parametrize("options", [{"order": 1}, {"order": 8}, {"train_bytes": 0}])
def test_config_checks(options):
    with pytest.raises(ConfigError):
        BaselinesConfig(**options)
