"""A real server of a tiny random model on a port of this machine, while a test wants it."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.served_adapters import load_served
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.server.app import Server, ServerSettings, create_app
from nemotron3.text import CHAT_STYLES, ChatTemplate, Tokenizer
from tests.tiny import randomized, tiny_config

MODEL = "tiny"
TEXT = "Hello there, why? <function=get_weather> <parameter=city> Paris </parameter> true false "


def write_model(folder: Path, *, style: str = "nano") -> Path:
    """A model directory with a vocabulary of bytes and few words, and a chat template."""
    tokenizer = Tokenizer.train([TEXT * 9], vocab_size=320, num_special_tokens=32)
    tokenizer.chat_template = ChatTemplate(CHAT_STYLES[style]).to_jinja()
    tokenizer.save(folder)
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    randomized(LanguageModel.from_config(config)).save_pretrained(folder)
    return folder


@dataclass
class Running:
    """A server that runs in a thread."""

    url: str
    llm: AsyncLLM
    server: Server

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        """One request, without a client library's opinions."""
        if body is not None:
            options["json"] = body
        return httpx2.post(f"{self.url}{path}", timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """One request."""
        return httpx2.get(f"{self.url}{path}", timeout=60, **options)

    def send(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """One request of any kind."""
        return httpx2.request(method, f"{self.url}{path}", timeout=60, **options)

    def becomes_idle(self, timeout_s: float = 20) -> bool:
        """Wait until the engine runs nothing."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            stats = self.llm.stats()
            if not stats.num_running and not stats.num_waiting:
                return True
            time.sleep(0.02)
        return False


@contextmanager
def running(
    folder: Path,
    *,
    api_key: str | None = None,
    allowed_origins: tuple[str, ...] = (),
    reasoning_grace: int = 0,
    weights_folder: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
    **limits: Any,
) -> Iterator[Running]:
    """Serve a model directory, and adapters for it."""
    llm, served = load_served(folder, adapters or {}, config=EngineConfig(**limits), device="cpu")
    settings = ServerSettings(
        served_model_name=MODEL,
        api_key=api_key,
        allowed_origins=allowed_origins,
        reasoning_grace=reasoning_grace,
        weights_folder=weights_folder,
    )
    server = create_app(llm, settings, served)
    config = uvicorn.Config(server.app, port=0, log_config=None, access_log=False, ws="none")
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", llm, server)
    finally:
        runner.should_exit = True
        thread.join(30)
        server.close()
