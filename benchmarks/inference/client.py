"""One client for all servers, from token ids to the times of the answer's tokens.

Requests ask for greedy tokens and ignore end tokens, so that all answers have the same length. The
time of HTTP and JSON is included for all servers.
"""

import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timed:
    """One answer: its tokens, and seconds from the request to its first and last token."""

    tokens: tuple[int, ...]
    first_s: float
    last_s: float


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client of one server on this machine."""

    port: int
    path: str
    pid: int
    """The server's process."""
    model: str | None = None
    """The `model` field of requests, if the server requires it."""

    def ask(self, prompt: Sequence[int], count: int, *, end: int | None = None) -> Timed:
        """Request an answer of `count` tokens.

        With end tokens ignored, llama.cpp never generates them, while our server continues after
        them. To compare tokens, pass the end token as `end`; our server then excludes it, too.
        """
        body = self._body(list(prompt), count)
        if end is not None and self.model is not None:
            body["logit_bias"] = {end: -100}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        start = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", self.path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{self.path} answers {response.status}: {response.read()[:500]!r}")
        tokens: list[int] = []
        first = last = 0.0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"{self.path} failed: {event['error']}")
            new = _tokens(event)
            if new:
                last = time.perf_counter() - start
                first = first or last
                tokens += new
        connection.close()
        if len(tokens) != count:
            raise SystemExit(f"{self.path} sent {len(tokens)} tokens, {count} were asked for")
        return Timed(tuple(tokens), first, last)

    def ask_all(self, prompts: Sequence[Sequence[int]], count: int, *, clients: int) -> float:
        """Seconds until `clients` clients, each with one request at a time, have all answers."""
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda prompt: self.ask(prompt, count), prompts))
        return time.perf_counter() - start

    def _body(self, prompt: list[int], count: int) -> dict[str, Any]:
        common = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "stream": True}
        if self.model is None:
            return common | {"n_predict": count, "return_tokens": True, "cache_prompt": True}
        return common | {"model": self.model, "max_tokens": count, "return_token_ids": True}


def _tokens(event: dict[str, Any]) -> list[int]:
    if "tokens" in event:
        return [] if event.get("stop") else event["tokens"]
    return [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
