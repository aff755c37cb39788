"""Responses that may be gone on from (`previous_response_id`), for as long as there is room.

In memory alone and bounded in number and size, the oldest forgotten first: a conversation that has
to last is the client's to keep, who can always send its items instead.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from nemotron3.server.http.errors import APIError


@dataclass(frozen=True, kw_only=True)
class StoredResponse:
    """A response and the conversation that it ends."""

    body: dict[str, Any]
    items: list[dict[str, Any]]
    size_bytes: int = field(default=0)


class ResponseStore:
    """Responses by id."""

    def __init__(self, *, max_responses: int = 1024, max_bytes: int = 64 * 2**20) -> None:
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._size_bytes = 0

    def put(self, body: dict[str, Any], items: list[dict[str, Any]]) -> None:
        """Keep a response, and forget the oldest where that takes too much room."""
        size = len(json.dumps(items)) + len(json.dumps(body))
        if size > self._max_bytes:
            return
        self._stored[body["id"]] = StoredResponse(body=body, items=items, size_bytes=size)
        self._size_bytes += size
        while len(self._stored) > self._max_responses or self._size_bytes > self._max_bytes:
            _, oldest = self._stored.popitem(last=False)
            self._size_bytes -= oldest.size_bytes

    def get(self, response_id: str, param: str) -> StoredResponse:
        """A response that is still there."""
        if response_id not in self._stored:
            raise APIError(
                404,
                f"{param} is {response_id!r}, and no such response is stored: it never was, or it "
                f"was forgotten for newer ones; send the whole conversation as input",
                param,
                "response_not_found",
            )
        self._stored.move_to_end(response_id)
        return self._stored[response_id]

    def delete(self, response_id: str) -> None:
        """Forget a response."""
        self._size_bytes -= self.get(response_id, "response_id").size_bytes
        del self._stored[response_id]
