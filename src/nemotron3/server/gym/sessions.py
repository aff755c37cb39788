"""Sessions of rollouts on a server of an environment, in bounded memory.

A session begins with `/seed_session` and is named by a random cookie. It is dropped when nobody has
used it for a while, and earlier where its rollout has been verified and others need the place. A
session that is in use is never dropped for another one: its rollout would be judged by a state that
it did not leave. New ones are refused instead.
"""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nemotron3.environments.verification import Failure
from nemotron3.errors import ConfigError, OverloadedError


@dataclass
class ServedSession:
    """The state of one rollout."""

    state: Any
    last_used_s: float
    is_verified: bool = False
    failure: Failure | None = None
    """What failed in it without the policy's fault; it then has no reward."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Calls of one rollout are executed one after the other."""


class SessionStore:
    """Sessions by their ids."""

    def __init__(
        self,
        *,
        max_sessions: int,
        expiry_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`expiry_s` is the time without a request after which a session is dropped."""
        for name, value in (("max_sessions", max_sessions), ("session_expiry", expiry_s)):
            if not value > 0:
                raise ConfigError(f"is {value}; it must be above 0", field=name)
        self._max_sessions, self._expiry_s, self._clock = max_sessions, expiry_s, clock
        self._sessions: OrderedDict[str, ServedSession] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        """Sessions that are kept."""
        return len(self._sessions)

    def assert_room(self) -> None:
        """Drop what may be dropped; raises `OverloadedError` where there is no room for another."""
        now = self._clock()
        while self._sessions:
            oldest = next(iter(self._sessions.values()))
            if now - oldest.last_used_s < self._expiry_s:
                break
            self._sessions.popitem(last=False)
        if len(self._sessions) < self._max_sessions:
            return
        over = next((id_ for id_, each in self._sessions.items() if each.is_verified), None)
        if over is None:
            raise OverloadedError(
                f"{self._max_sessions} rollouts are being played, which is the most; try later, or "
                "start the server with a larger --max-sessions"
            )
        del self._sessions[over]

    def add(self, state: Any) -> str:
        """Keep a state; returns the id of its session."""
        self.assert_room()
        session_id = secrets.token_urlsafe(24)
        self._sessions[session_id] = ServedSession(state, self._clock())
        return session_id

    def get(self, session_id: str | None) -> ServedSession | None:
        """The session of an id, which is used now; None where there is none (any longer)."""
        session = self._sessions.get(session_id or "")
        if session is None or session_id is None:
            return None
        now = self._clock()
        if now - session.last_used_s >= self._expiry_s:
            del self._sessions[session_id]
            return None
        session.last_used_s = now
        self._sessions.move_to_end(session_id)
        return session
