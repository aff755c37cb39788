"""Speculative decoding: the acceptance of drafts, and the speed of one stream.

    python -m benchmarks.speculation runs/tiny/model
    python -m benchmarks.speculation runs/reasoner/model --llama-server build/bin/llama-server

Requests are answered one at a time. Their prompts come from the held-out text of the run that
trained the model: the prompt of a conversation, or a part of a text. There are 0 to 4 drafts per
step, and an adaptive number that the engine chooses ("up to 3"). Drafts change no token, except
where rounding breaks a tie differently; answers that differ from those without drafts are counted.
Speeds are those of decoding, without the prompt.

llama.cpp, if given, has the same weights and prompts and its own drafting
(`--spec-type draft-mtp`); both programs stop at the token that ends a text. At a temperature above
0 it draws other random numbers, so answers differ and only rates can be compared. All contestants
take turns, answer by answer. The published models are sampled at a temperature of 1.
"""

import argparse
import bisect
import contextlib
import datetime
import json
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.cpu import RESULTS
from benchmarks.inference import servers
from benchmarks.inference.client import Client
from benchmarks.llama_cpp import write_gguf_of
from benchmarks.machine import BUSY, command, description, load_average, warn_if_busy
from benchmarks.page import ROOT, fill, table
from benchmarks.timing import turns

from nemotron3 import LLM, EngineConfig, LanguageModel, SamplingParams
from nemotron3.config import read_run
from nemotron3.data.token_files import TokenFile
from nemotron3.inference.model_runner.speculative import DEFAULT_DRAFTS
from nemotron3.inference.output_processor import Prompt
from nemotron3.recipes.inputs import open_inputs
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.text import Tokenizer

PAGE = ROOT / "docs" / "reasoning.md"
MOST = 4
STRETCH = 64
"""Tokens of a prompt that is a part of a text."""
PAUSE_S = 0.05
"""Pause before an answer: llama.cpp's threads spin for a while after their work."""

Prompts = list[tuple[int, ...]]


@dataclass(kw_only=True)
class Outcome:
    """The result of one number of drafts over all prompts."""

    name: str
    tokens: int = 0
    """Tokens from decoding steps: all but the first of each answer."""
    steps: int = 0
    drafted: int = 0
    seconds: float = 0.0
    tried: list[int] = field(default_factory=list[int])
    """For each position in a window: how often its draft was tried, those before it being
    accepted."""
    stood: list[int] = field(default_factory=list[int])
    answers: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])

    def count(self, gain: int, drafts: int) -> None:
        """Count a step with `drafts` drafts that gave `gain` tokens."""
        self.tokens += gain
        self.steps += 1
        self.tried = self.tried or [0] * drafts
        self.stood = self.stood or [0] * drafts
        for place in range(min(gain, drafts)):
            self.tried[place] += 1
            self.stood[place] += gain > place + 1

    def record(self, plain: "Outcome") -> dict[str, Any]:
        """The result as it is stored, compared with the outcome without drafts."""
        pairs = zip(self.answers, plain.answers, strict=True)
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "drafted": self.drafted,
            "tokens_per_step": self.tokens / self.steps,
            "tokens_per_s": self.tokens / self.seconds,
            "speedup": self.tokens / self.seconds * plain.seconds / plain.tokens,
            "acceptance": [s / max(t, 1) for s, t in zip(self.stood, self.tried, strict=True)],
            "differing_answers": sum(a != b for a, b in pairs),
        }


def held_out_of(model: Path) -> tuple[Tokenizer, dict[str, TokenFile]]:
    """Tokenizer and held-out text, by source, of the run that trained a model."""
    run = read_run(model.parent, PretrainRun)
    corpus, _ = open_inputs(model.parent, run.corpus, say=print, progress=lambda *_: None)
    return corpus.tokenizer, dict(corpus.held_out)


def prompts_of(model: Path, count: int) -> Prompts:
    """Prompts from held-out text, spread over its sources."""
    tokenizer, held_out = held_out_of(model)
    begins, of_each = tokenizer.think_start_id, max(count // len(held_out), 1)
    prompts: Prompts = []
    for file in held_out.values():
        for place in range(of_each):
            at = place * (file.num_tokens - STRETCH) // of_each
            document = bisect.bisect_right(file.document_bounds.tolist(), at) - 1
            start, end = file.document_bounds[document : document + 2].tolist()
            ids = file.tokens[start:end].tolist()
            if begins in ids:
                prompts.append(tuple(ids[: ids.index(begins) + 2]))  # and the token after the tag
            else:
                prompts.append(tuple(file.tokens[at : at + STRETCH].tolist()))
    return prompts


class Ours:
    """Our engine with one number of drafts."""

    def __init__(self, llm: LLM, params: SamplingParams, config: EngineConfig) -> None:
        self._llm, self._params = llm, params
        most = config.max_draft_tokens or 0
        self._fixed = 0 if config.adapts_drafts else most
        self.outcome = Outcome(name=f"up to {most}" if config.adapts_drafts else str(most))

    def answer(self, prompt: tuple[int, ...], seed: int) -> None:
        """Generate one answer, and add it to the outcome."""
        gains: list[int] = []
        drafted = self._llm.stats().drafted_tokens
        request = self._llm.generate(
            Prompt(ids=prompt),
            replace(self._params, seed=seed),
            on_delta=lambda _, delta: gains.append(len(delta.token_ids)),
        )[0]
        for gain in gains[1:]:
            self.outcome.count(gain, self._fixed)
        self.outcome.seconds += request.total_s - (request.first_token_s or 0.0)
        self.outcome.answers.append(request.outputs[0].token_ids)
        self.outcome.drafted += self._llm.stats().drafted_tokens - drafted


class Theirs:
    """llama.cpp's server with one number of drafts."""

    def __init__(self, client: Client, params: SamplingParams, drafts: int) -> None:
        self._client, self._params, self._drafts = client, params, drafts
        self.outcome = Outcome(name=str(drafts))

    def answer(self, prompt: tuple[int, ...], seed: int) -> None:
        """Generate one answer twice, timed and then streamed, and add both to the outcome.

        Streaming would make it slower; without streaming its count of accepted drafts would include
        those after the end of the answer.
        """
        timed, outcome = self._events(prompt, seed, told=False)[-1], self.outcome
        outcome.seconds += timed["timings"]["predicted_ms"] / 1e3
        events = self._events(prompt, seed, told=True)
        outcome.drafted += events[-1]["timings"].get("draft_n", 0)
        outcome.answers.append(tuple(token for event in events for token in event["tokens"]))
        for gain in gains_of(events)[1:]:  # the first token comes from the prefill
            outcome.count(gain, self._drafts)

    def _events(self, prompt: Sequence[int], seed: int, *, told: bool) -> list[dict[str, Any]]:
        """An answer of llama.cpp, in one event or, if `told`, one event per token."""
        params = self._params
        body = {"prompt": list(prompt), "n_predict": params.max_tokens, "seed": seed}
        body |= {"temperature": params.temperature, "samplers": ["temperature"]}
        body |= {"cache_prompt": False, "return_tokens": True}
        body |= {"stream": told, "timings_per_token": told}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._client.port}{self._client.path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            if not told:
                return [json.load(answer)]
            lines = [line[6:] for line in answer if line.startswith(b"data: {")]
            return [json.loads(line) for line in lines]


def gains_of(events: Sequence[dict[str, Any]]) -> list[int]:
    """Tokens of each step of a streamed answer; those of one step have the same draft counts."""
    gains: list[int] = []
    before = None
    for event in events:
        drafted = event["timings"].get("draft_n", 0)
        if not event["tokens"]:
            continue
        if gains and drafted and drafted == before:
            gains[-1] += len(event["tokens"])
        else:
            gains.append(len(event["tokens"]))
        before = drafted
    return gains


def params_for(model: Path, *, temperature: float, max_tokens: int) -> SamplingParams:
    """Parameters with which an answer ends as in llama.cpp: at the end of the text, not of a turn.

    The tokens between the two are the easiest to draft, so a program that generates them would seem
    to draft better.
    """
    end: int = json.loads((model / "config.json").read_text())["eos_token_id"]
    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens, ignore_eos=True, stop_token_ids=(end,)
    )


def our_engines(model: Path, params: SamplingParams) -> list[Ours]:
    """One engine for each number of drafts; the adaptive one is last."""
    alone = EngineConfig(max_num_seqs=1, adapts_drafts=False)
    configs = [replace(alone, max_draft_tokens=drafts) for drafts in range(MOST + 1)]
    configs.append(replace(alone, max_draft_tokens=DEFAULT_DRAFTS, adapts_drafts=True))
    weights, tokenizer = LanguageModel.from_pretrained(model), Tokenizer.from_directory(model)
    return [
        Ours(LLM(weights, tokenizer=tokenizer, config=config), params, config) for config in configs
    ]


@contextlib.contextmanager
def their_servers(server: Path, model: Path, params: SamplingParams) -> Iterator[list[Theirs]]:
    """One llama.cpp server for each number of drafts; it has no adaptive number."""
    with contextlib.ExitStack() as stack:
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoint"
        shutil.copytree(model, copy)  # in which the tokenizer is replaced
        vocab_size = json.loads((copy / "config.json").read_text())["vocab_size"]
        gguf = write_gguf_of(server, copy, vocab_size)
        threads = torch.get_num_threads()
        yield [
            Theirs(
                stack.enter_context(
                    servers.llama_cpp(server, gguf, threads=threads, slots=1, drafts=drafts)
                ),
                params,
                drafts,
            )
            for drafts in range(MOST + 1)
        ]


def measure(writers: Sequence[Ours | Theirs], prompts: Prompts, *, rounds: int) -> None:
    """Let all generate all answers in turns, so that a slow minute of the machine affects all."""
    for writer in writers:
        writer.answer(prompts[0], 0)  # compiles, and measures the cost of steps
        writer.outcome = Outcome(name=writer.outcome.name)
    orders = turns(writers, rounds=rounds * len(prompts))
    for seed in range(rounds):
        for prompt in prompts:
            for writer in next(orders):
                time.sleep(PAUSE_S)
                writer.answer(prompt, seed)


def records(writers: Sequence[Ours | Theirs]) -> dict[str, dict[str, Any]]:
    """The results, compared with the first, which has no drafts."""
    return {w.outcome.name: w.outcome.record(writers[0].outcome) for w in writers}


def as_markdown(result: dict[str, Any]) -> str:
    """The record as a table, one row per number of drafts; without speeds if they are noisy."""
    machine, theirs = result["machine"], result["llama_cpp"]
    is_noise = machine["load_before"] > BUSY  # the load afterwards is our own
    columns = ["acceptance by place", "tokens a step"]
    columns += [] if is_noise else ["tokens/s", "speed-up"]
    head = ["drafts", *columns]
    rows = [head + ([f"{column}, llama.cpp" for column in columns] if theirs else [])]
    for name, each in result["ours"].items():
        if is_noise and not each["acceptance"]:
            continue  # no drafts, or the adaptive number
        row = [name]
        for program in (each, theirs.get(name)) if theirs else (each,):
            row += _speeds(program)[: len(columns)] if program else [""] * len(columns)
        rows.append(row)
    noise = " Others used the machine, so speeds are left out." if is_noise else ""
    return (
        f"**{result['model']}**: `{result['command']}` at commit {machine['commit']}, "
        f"{result['date']}: {result['prompts']} prompts, temperature {result['temperature']}; "
        f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}; load average "
        f"{machine['load_before']} before and {machine['load_after']} after.{noise}\n\n"
        f"{table(rows)}"
    )


def _speeds(each: dict[str, Any]) -> list[str]:
    return [
        ", ".join(f"{a:.0%}" for a in each["acceptance"]),
        f"{each['tokens_per_step']:.2f}",
        f"{each['tokens_per_s']:,.0f}",
        f"{each['speedup']:.2f}x",
    ]


def main() -> None:
    """Measure, write the results, and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder of a run, as in runs/tiny/model")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="answers to each prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--llama-server", type=Path)
    arguments = parser.parse_args()
    name = arguments.model.resolve().parent.name
    if arguments.temperature:
        name += f"-at-{arguments.temperature:g}"
    prompts = prompts_of(arguments.model, arguments.prompts)
    before = load_average()
    warn_if_busy(before)
    params = params_for(
        arguments.model, temperature=arguments.temperature, max_tokens=arguments.max_tokens
    )
    with contextlib.ExitStack() as stack:
        ours, theirs = our_engines(arguments.model, params), []
        if arguments.llama_server:
            peers = their_servers(arguments.llama_server, arguments.model, params)
            theirs = stack.enter_context(peers)
        measure([*ours, *theirs], prompts, rounds=arguments.rounds)
    result = {
        "command": command("benchmarks.speculation"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": arguments.model.resolve().parent.name,
        "prompts": len(prompts),
        "temperature": arguments.temperature,
        "ours": records(ours),
        "llama_cpp": records(theirs),
        "machine": description() | {"load_before": before, "load_after": load_average()},
    }
    text = as_markdown(result)
    file = RESULTS / f"speculation-{name}-{result['date']}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    page, section = PAGE.read_text(encoding="utf-8"), f"speculation-{name}"
    if f"<!-- {section} -->" in page:  # it shows some models, at some temperatures
        PAGE.write_text(fill(page, section, text), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
