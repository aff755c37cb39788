"""A server under load: many clients, mixed requests, cancellations, for minutes.

    python -m benchmarks.load runs/tiny/model                 # 64 clients for two minutes
    python -m benchmarks.load runs/tiny/model --seconds 600

First each request of a pool (of different prompts and lengths, including chats with reasoning
budgets) is answered alone. Then clients repeatedly send random requests of the pool and read the
answers; some disconnect in the middle. Every complete answer must have the same tokens as alone.
The server's memory is sampled during the load, and after it the server must be idle. For 1, 8, 32
and 64 clients the time to the first token and the throughput are recorded. Results go to
benchmarks/results/; the exit status is 1 if an answer differed or was lost, or if the server did
not become idle.
"""

import argparse
import http.client
import json
import os
import random
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.inference import servers

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"
_WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "nobler", "in", "arrows"]


@dataclass(frozen=True)
class Request:
    """A request of the pool: its path and its body."""

    path: str
    body: dict[str, Any]


@dataclass
class Storm:
    """The results of all clients."""

    whole: int = 0
    left: int = 0
    differing: int = 0
    failed: list[str] = field(default_factory=list)
    tokens: int = 0
    firsts_s: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def summary(self, seconds: float) -> dict[str, Any]:
        """Counts, latencies and throughput."""
        firsts = sorted(self.firsts_s) or [0.0]
        return {
            "whole": self.whole,
            "left_early": self.left,
            "differing": self.differing,
            "failed": len(self.failed),
            "tokens_per_s": self.tokens / seconds,
            "first_token_ms": {
                "median": 1000 * statistics.median(firsts),
                "p95": 1000 * firsts[int(0.95 * (len(firsts) - 1))],
            },
        }


def pool(size: int, chance: random.Random) -> list[Request]:
    """Requests of all kinds, each greedy, so that there is one right answer."""
    requests = []
    for i in range(size):
        text = " ".join(chance.choices(_WORDS, k=chance.randint(1, 120)))
        body: dict[str, Any] = {
            "model": "m",
            "temperature": 0,
            "max_tokens": chance.choice([1, 8, 24, 64, 128]),
            "stream": True,
            "return_token_ids": True,
        }
        if i % 3:
            requests.append(Request("/v1/completions", body | {"prompt": text}))
        else:
            chat = {"messages": [{"role": "user", "content": text}]}
            budget = {"reasoning_budget": chance.choice([0, 1, 8, 1000])}
            requests.append(Request("/v1/chat/completions", body | chat | budget))
    return requests


def ask(port: int, request: Request, *, most: int | None = None) -> tuple[list[int], float]:
    """The tokens of an answer (at most `most`, then disconnect), and seconds to the first one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    start, first, tokens = time.perf_counter(), 0.0, []
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", request.path, json.dumps(request.body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()[:300]!r}")
        is_over = False
        for line in response:
            if line.startswith(b"data: [DONE]"):
                is_over = True
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"])[:300])
            new = [t for choice in event["choices"] for t in choice.get("token_ids") or ()]
            if new and not first:
                first = time.perf_counter() - start
            tokens += new
            if most is not None and len(tokens) >= most:
                return tokens, first
        if not is_over:
            raise RuntimeError("the stream ended without [DONE]")
        return tokens, first
    finally:
        connection.close()


def client(
    port: int, requests: list[Request], alone: list[list[int]], storm: Storm, *, seed: int,
    until: float, leaves: float,
) -> None:  # fmt: skip
    """Send requests, one after another, until the time is over."""
    chance = random.Random(seed)
    while time.monotonic() < until:
        place = chance.randrange(len(requests))
        most = chance.randint(0, 12) if chance.random() < leaves else None
        try:
            tokens, first = ask(port, requests[place], most=most)
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            with storm.lock:
                storm.failed.append(f"request {place}: {error!r}")
            continue
        with storm.lock:
            storm.tokens += len(tokens)
            if first:
                storm.firsts_s.append(first)
            wanted = alone[place] if most is None else alone[place][: len(tokens)]
            storm.differing += tokens != wanted
            storm.whole += most is None
            storm.left += most is not None


def run(
    port: int, requests: list[Request], alone: list[list[int]], *, clients: int, seconds: float,
    leaves: float,
) -> tuple[Storm, float]:  # fmt: skip
    """Run a number of clients for some seconds; returns the results and the actual time."""
    storm, start = Storm(), time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        for seed in range(clients):
            threads.submit(
                client, port, requests, alone, storm,
                seed=seed, until=start + seconds, leaves=leaves,
            )  # fmt: skip
    return storm, time.monotonic() - start


def watch(pid: int, samples: list[int], stop: threading.Event) -> None:
    """Sample a process's resident bytes every half second."""
    status = Path(f"/proc/{pid}/status")
    while not stop.wait(0.5):
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
        samples.append(int(lines[0].split()[1]) * 1024)


def at_rest(port: int, seconds: float = 10) -> bool:
    """Whether no request runs or waits, within some seconds after all clients have ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        values = [
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith(("nemotron3_requests_running", "nemotron3_requests_waiting"))
        ]
        if values and not any(values):
            return True
        time.sleep(0.2)
    return False


def measure(
    path: Path, *, seconds: float, clients: tuple[int, ...], threads: int
) -> dict[str, Any]:
    """All results as they are stored."""
    requests = pool(24, random.Random(0))
    with servers.ours(path, threads=threads) as server:
        alone = [ask(server.port, request)[0] for request in requests]
        figures = {}
        for number in clients[:-1]:
            storm, took = run(
                server.port, requests, alone,
                clients=number, seconds=min(seconds / 4, 20), leaves=0.0,
            )  # fmt: skip
            figures[str(number)] = storm.summary(took)
            print(f"{number:3} clients  {words(figures[str(number)])}", flush=True)
        samples: list[int] = []
        stop = threading.Event()
        watcher = threading.Thread(target=watch, args=(server.pid, samples, stop))
        watcher.start()
        storm, took = run(
            server.port, requests, alone, clients=clients[-1], seconds=seconds, leaves=0.3
        )
        stop.set()
        watcher.join()
        figures[str(clients[-1])] = storm.summary(took)
        print(f"{clients[-1]:3} clients  {words(figures[str(clients[-1])])}")
        rests = at_rest(server.port)
    third = max(len(samples) // 3, 1)
    memory = {"first_third": max(samples[:third]), "last_third": max(samples[-third:])}
    print(
        f"memory at most {memory['first_third'] / 1e6:.0f} MB in the first third of the time, "
        f"{memory['last_third'] / 1e6:.0f} MB in the last; at rest afterwards: {rests}"
    )
    for line in storm.failed[:5]:
        print(f"  FAILED {line}")
    return {"clients": figures, "memory_bytes": memory, "at_rest": rests, "seconds": seconds}


def words(figure: dict[str, Any]) -> str:
    first = figure["first_token_ms"]
    return (
        f"{figure['whole']} whole, {figure['left_early']} left early, "
        f"{figure['differing']} differing, {figure['failed']} failed; "
        f"{figure['tokens_per_s']:.0f} tokens/s, first token {first['median']:.0f} ms "
        f"(p95 {first['p95']:.0f} ms)"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    before = machine.load_average()
    figures = measure(
        options.model,
        seconds=options.seconds,
        clients=tuple(options.clients),
        threads=options.threads,
    )
    loads = {"load_before": before, "load_after": machine.load_average()}
    result = {
        "command": machine.command("benchmarks.load"),
        "date": date.today().isoformat(),
        "machine": machine.description() | loads,
        "model": options.model.resolve().parent.name,
        **figures,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"load-{result['date']}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target)
    bad = sum(f["differing"] + f["failed"] for f in result["clients"].values())
    return int(bool(bad) or not result["at_rest"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    sys.exit(main())
