"""The comparison of servers: for the same request, both return token ids."""

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from benchmarks.inference import servers
from benchmarks.inference.client import Client
from tokenizers import Tokenizer, decoders

from tests.oracles import llama_cpp

END = 2


def test_no_token_of_the_vocabulary_for_llama_cpp_ends_half_a_character(tmp_path):
    llama_cpp.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.get_vocab_size() == llama_cpp.VOCAB
    texts = [tokenizer.decode([token]) for token in range(3, llama_cpp.VOCAB)]
    assert all(text and text.isascii() for text in texts)
    assert {" ", "\n", "a", "\x7f"} <= set(texts)


@pytest.fixture
def server():
    """Writes two tokens, as both servers would, and keeps what it was asked."""

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            ours = b'data: {"choices": [{"token_ids": [7, 8]}]}\n\n'
            theirs = b'data: {"tokens": [7]}\n\ndata: {"tokens": [8]}\n\n'
            self.wfile.write(ours if self.path == "/ours" else theirs)

        def log_message(self, *_):
            pass

    asked = []
    running = HTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running.server_port, asked
    running.shutdown()
    thread.join()
    running.server_close()


def test_ours_keeps_from_the_end_where_llama_cpp_does(server):
    port, asked = server
    for path, model in (("/ours", "m"), ("/theirs", None)):
        client = Client(port=port, path=path, pid=0, model=model)
        assert client.ask([5], 2, end=END).tokens == (7, 8)
    assert asked[0]["logit_bias"] == {str(END): -100}
    assert "logit_bias" not in asked[1]
    assert all(body["ignore_eos"] for body in asked)


def test_tokens_that_were_not_sent_are_an_error(server):
    port, _ = server
    with pytest.raises(SystemExit, match="sent 2 tokens, 3 were asked for"):
        Client(port=port, path="/theirs", pid=0).ask([5], 3)


@pytest.mark.skipif(sys.platform != "linux", reason="a process's state is read from /proc")
@pytest.mark.parametrize("own", [0, None])
def test_whoever_has_no_turn_is_stopped(own):
    def state(process):
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    peers = [subprocess.Popen(command, start_new_session=True) for _ in range(3)]
    try:
        groups = [peer.pid for peer in peers]
        with servers.alone(None if own is None else groups[own], groups):
            deadline = time.monotonic() + 10
            wanted = [number != own for number in range(3)]
            while [state(peer) == "T" for peer in peers] != wanted:
                assert time.monotonic() < deadline, [state(peer) for peer in peers]
        while "T" in [state(peer) for peer in peers]:
            assert time.monotonic() < deadline
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
