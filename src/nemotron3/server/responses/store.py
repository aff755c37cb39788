"""Stored responses, which requests continue by `previous_response_id`.

They are kept in memory, limited in number and size; the least recently used are dropped first. A
client that needs a conversation for longer keeps its items and sends all of them.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from nemotron3.server.http.errors import APIError


@dataclass(frozen=True, kw_only=True)
class StoredResponse:
    """A response, and all items of its conversation."""

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
        """Store a response, and drop the least recently used while there are too many."""
        size = len(json.dumps(items)) + len(json.dumps(body))
        if size > self._max_bytes:
            return
        self._stored[body["id"]] = StoredResponse(body=body, items=items, size_bytes=size)
        self._size_bytes += size
        while len(self._stored) > self._max_responses or self._size_bytes > self._max_bytes:
            _, oldest = self._stored.popitem(last=False)
            self._size_bytes -= oldest.size_bytes

    def get(self, response_id: str, param: str) -> StoredResponse:
        """Return a stored response; raises APIError if there is none. `param` names the id."""
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
        """Delete a response; raises APIError if there is none."""
        self._size_bytes -= self.get(response_id, "response_id").size_bytes
        del self._stored[response_id]
