"""Sessions of rollouts: found again, dropped when unused, bounded in number."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from nemotron3.errors import ConfigError, OverloadedError
from nemotron3.server.gym.sessions import SessionStore

MOST, EXPIRY_S = 4, 10.0


class Sessions(RuleBasedStateMachine):
    """A store beside a dictionary that remembers everything."""

    ids = Bundle("ids")

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.store = SessionStore(max_sessions=MOST, expiry_s=EXPIRY_S, clock=lambda: self.now)
        self.used = {}
        self.verified = set()

    def alive(self):
        return {id_ for id_, last in self.used.items() if self.now - last < EXPIRY_S}

    @rule(target=ids)
    def add(self):
        in_use = self.alive() - self.verified
        try:
            new = self.store.add(len(self.used))
        except OverloadedError:
            assert len(in_use) >= MOST
            return "none"
        assert new not in self.used
        assert len(in_use) < MOST
        self.used[new] = self.now
        return new

    @rule(id_=ids)
    def use(self, id_):
        found = self.store.get(id_)
        if id_ in self.alive() - self.verified:
            assert found is not None  # one in use is never dropped
            assert found.state == list(self.used).index(id_)
        elif id_ not in self.alive():
            assert found is None
        if found is not None:
            self.used[id_] = self.now

    @rule(id_=consumes(ids))
    def verify(self, id_):
        found = self.store.get(id_)
        if found is not None:
            found.is_verified = True
            self.used[id_] = self.now
            self.verified.add(id_)

    @rule(seconds=st.sampled_from([0.5, 3.0, 9.0, 11.0]))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def is_bounded(self):
        assert len(self.store) <= MOST


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=40, deadline=None)


def test_limits_are_checked():
    for limits in ({"max_sessions": 0, "expiry_s": 1.0}, {"max_sessions": 1, "expiry_s": 0.0}):
        with pytest.raises(ConfigError, match="must be above 0"):
            SessionStore(**limits)


def test_full_is_told_with_the_remedy():
    store = SessionStore(max_sessions=1, expiry_s=1e9)
    first = store.add("state")
    with pytest.raises(OverloadedError, match=r"1 rollouts .* --max-sessions"):
        store.add("other")
    store.get(first).is_verified = True
    assert store.get(store.add("other")).state == "other"
    assert store.get(first) is None
    assert store.get(None) is None
