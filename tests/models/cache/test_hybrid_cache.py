"""The methods of the carried state in any order: a slot always holds the right sequence."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nemotron3.errors import OverloadedError
from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.models.cache.pages import PagePool, page_memory
from tests.tiny import tiny_config, tiny_model, tokens_for
from tests.tolerances import FLOAT64

CONFIG = tiny_config("M*E/*E")
SLOTS, PAGES, PAGE_SIZE = 4, 14, 4


def new_cache(model, **changes):
    given = {"slots": SLOTS, "page_size": PAGE_SIZE, "pages": PAGES} | changes
    return HybridCache(model.config, dtype=torch.float64, device=torch.device("cpu"), **given)


class Verbs(RuleBasedStateMachine):
    """Compared with the simplest state: the tokens of each slot, processed again in every call."""

    CONFIG = CONFIG

    def __init__(self):
        super().__init__()
        self.model = tiny_model(self.CONFIG, dtype=torch.float64)
        self.cache = new_cache(self.model)
        self.held = [[] for _ in range(SLOTS)]
        self.kept = []
        self.drawn = 0

    def draw(self, count):
        self.drawn += 1
        return tokens_for(self.CONFIG, count, seed=self.drawn).tolist()

    def call(self, feeds, *, is_verification=False):
        """Feed slots, and compare the outputs with a pass over all of their tokens."""
        slots, tokens = list(feeds), [token for part in feeds.values() for token in part]
        lengths = [len(part) for part in feeds.values()]
        try:
            layout = self.cache.layout(lengths, slots, is_verification=is_verification)
        except OverloadedError:
            for slot in slots:  # what was reserved for some may stay with them
                if self.cache.missing_pages(slot, len(feeds[slot])) > self.cache.pool.num_free:
                    return None
            raise
        with torch.no_grad():
            logits = self.model(torch.tensor(tokens), layout=layout, state=self.cache)
            for (slot, part), mine in zip(feeds.items(), logits.split(lengths), strict=True):
                whole = self.model(torch.tensor([self.held[slot] + part]))[0, -len(part) :]
                assert (mine - whole).abs().max() <= FLOAT64 * whole.abs().max()
        return layout

    @rule(slots=st.sets(st.integers(0, SLOTS - 1), min_size=1), count=st.integers(1, 20))
    def feed(self, slots, count):
        feeds = {slot: self.draw(count if slot % 2 else 1 + count // 2) for slot in slots}
        if self.call(feeds) is not None:
            for slot, part in feeds.items():
                self.held[slot] += part

    @rule(slots=st.sets(st.integers(0, SLOTS - 1), min_size=1), data=st.data())
    def draft(self, slots, data):
        count = data.draw(st.integers(1, 5))
        feeds = {slot: self.draw(count) for slot in slots}
        layout = self.call(feeds, is_verification=True)
        if layout is not None:
            counts = [data.draw(st.integers(1, count)) for _ in slots]
            self.cache.accept(layout, counts)
            for (slot, part), stands in zip(feeds.items(), counts, strict=True):
                self.held[slot] += part[:stands]

    @rule(slots=st.sets(st.integers(0, SLOTS - 1), min_size=1))
    def draft_in_vain(self, slots):
        """A verification call whose drafts are all rejected leaves no trace."""
        self.call({slot: self.draw(2) for slot in slots}, is_verification=True)

    @rule(slot=st.integers(0, SLOTS - 1))
    def keep(self, slot):
        self.kept.append((self.cache.snapshot(slot), list(self.held[slot])))

    @precondition(lambda self: self.kept)
    @rule(slot=st.integers(0, SLOTS - 1), data=st.data())
    def restore(self, slot, data):
        snapshot, tokens = data.draw(st.sampled_from(self.kept))
        self.cache.restore(slot, snapshot)
        self.held[slot] = list(tokens)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data):
        snapshot, _ = self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))
        self.cache.drop(snapshot)

    @rule(source=st.integers(0, SLOTS - 1), other=st.integers(0, SLOTS - 1))
    def fork(self, source, other):
        self.cache.fork(source, other)
        self.held[other] = list(self.held[source])

    @rule(slot=st.integers(0, SLOTS - 1))
    def free(self, slot):
        self.cache.free(slot)
        self.held[slot] = []

    @invariant()
    def counts_agree(self):
        assert self.cache.lengths == [len(tokens) for tokens in self.held]
        held = {page for row in self.cache.table.rows for page in row}
        held |= {page for snapshot, _ in self.kept for page in snapshot.pages}
        assert self.cache.pool.num_free == PAGES - len(held)

    def teardown(self):
        for slot in range(SLOTS):
            self.cache.free(slot)
        for snapshot, _ in self.kept:
            self.cache.drop(snapshot)
        assert self.cache.pool.num_free == PAGES


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_fixed_pool_says_when_it_is_used_up_and_nothing_is_lost():
    model = tiny_model(CONFIG, dtype=torch.float64)
    cache = new_cache(model)
    cache.reserve(0, 40)
    with pytest.raises(OverloadedError, match=r"5 pages are needed and 4 of 14 are free"):
        cache.reserve(1, 20)
    assert cache.table.rows[1] == []
    cache.reserve(1, 16)
    cache.free(0)
    cache.reserve(1, 20)


def test_a_growing_pool_grows_and_uses_what_is_free_first():
    pool = PagePool()
    assert pool.take(3) == [0, 1, 2]
    pool.release([1])
    assert pool.take(1) == [1]
    assert len(pool) == 3
    assert len(pool.take(2)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("pages", [0, 3])
def test_pages_begin_as_zeros_on_a_line_of_the_cache(dtype, pages):
    memory = page_memory((pages, 4, 2, 5), dtype, torch.device("cpu"))
    assert (memory.shape, memory.dtype) == ((pages, 4, 2, 5), dtype)
    assert memory.is_contiguous()
    assert memory.data_ptr() % 64 == 0
    assert not memory.float().any()


def resident_bytes():
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_pages_take_no_memory_before_they_are_written_to():
    before = resident_bytes()
    memory = page_memory((2**16, 64, 2, 64), torch.float32, torch.device("cpu"))  # 2 GiB
    assert resident_bytes() - before < 2**26
    memory[5] = 1
    assert memory[4:7].sum() == 64 * 2 * 64


def test_what_is_released_too_often_or_shared_when_free_is_noticed():
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.release([page])
    with pytest.raises(AssertionError, match="more often than it was held"):
        pool.release([page])
    with pytest.raises(AssertionError, match="is free and cannot be shared"):
        pool.share([page])


def test_a_snapshot_costs_the_states_and_no_pages():
    model = tiny_model(CONFIG, dtype=torch.float64)
    cache = new_cache(model)
    layout = cache.layout([30], [0])
    with torch.no_grad():
        model(tokens_for(CONFIG, 30), layout=layout, state=cache)
    free = cache.pool.num_free
    snapshot = cache.snapshot(0)
    assert cache.pool.num_free == free
    state = cache.layers[0]
    assert snapshot.nbytes == state.conv_states[0].nbytes + state.ssm_states[0][0].nbytes
