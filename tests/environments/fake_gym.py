"""A resources server that answers as a test wants, on a port of this machine."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATHS = ("/seed_session", "/verify", "/aggregate_metrics")


@dataclass
class Request:
    """What a client sent."""

    path: str
    body: Any
    cookie: str | None


@dataclass
class Answer:
    """What it is answered; `drop` closes the connection instead."""

    body: Any = field(default_factory=dict)
    status: int = 200
    cookies: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: bool = False


Respond = Callable[[Request], Answer]


@contextmanager
def fake_server(respond: Respond, *, described: Any = None) -> Iterator[str]:
    """Serve `respond` for POST requests; `described` is the server's description of itself."""
    description = {"paths": {path: {} for path in PATHS}} if described is None else described

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = description if self.path == "/openapi.json" else None
            self.send(Answer(body=found, status=200 if found is not None else 404))

        def do_POST(self):
            size = int(self.headers["Content-Length"])
            assert self.headers["Content-Type"] == "application/json"
            body = json.loads(self.rfile.read(size))
            answer = respond(Request(self.path, body, self.headers.get("Cookie")))
            if answer.drop:
                self.close_connection = True
            else:
                self.send(answer)

        def send(self, answer):
            text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
            data = text.encode()
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            for name, value in answer.cookies.items():
                self.send_header("Set-Cookie", f"{name}={value}; path=/; Max-Age=1209600; httponly")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
