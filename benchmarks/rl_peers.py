"""Reinforcement learning beside its peers: rollouts, and whole updates, in turns within one run.

    python -m benchmarks.rl_peers runs/tiny-sft/model
    python -m benchmarks.rl_peers runs/tiny-sft/model --trl-python trl/bin/python

* Rollouts, 64 at once: ours beside transformers' `generate`. Tokens count to each answer's own end.
* An update of 8 prompts with 8 answers each, from sampling through rewards and loss to AdamW: ours
  beside TRL's `GRPOTrainer`. Both train on every answer, none is drawn again for groups without
  variance, both clip the gradient's norm. The learning rate is so small that answers stay alike.

Peers run two models: the same one in transformers' Nemotron-H, and a dense Qwen3 of the same active
parameters with random weights. Its answers are ended at the lengths that ours have; in a further
column all of them have the mean length, so that nothing is computed for padding. Prompts, sampling,
rewards, number of threads and float32 are the same. First log-probabilities and rewards of a batch
of rollouts must agree, or nothing is timed. A turn is done once without counting, and then counts.
What is compared are ratios of turns of one run.

TRL is not among the dependencies; it runs in an environment of its own:

    python -m venv trl
    trl/bin/pip install -c constraints.txt ".[environments]" transformers trl==1.16.0

Without --trl-python the updates are left out.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.models import TOLERANCE
from benchmarks.regression import HEAP, median_interval
from benchmarks.rl_peers_ours import CLIP_GRAD_NORM, LEARNING_RATE, Ours, Turn
from benchmarks.timing import PAUSE_S, turns

from benchmarks import machine
from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import model_costs
from nemotron3.recipes.rl import tiny_rl
from nemotron3.rl.rollouts import Rollout
from nemotron3.runtime.malloc import retain_freed_memory

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
AT_ONCE = 64
"""Rollouts that are sampled at once, and answers of an update."""
MOST_OTHERS = 0.05
"""Share of the processors that other programs may take; beyond it peers' threads wait for them."""
OURS, SAME, DENSE, EVEN = "ours", "the same model", "dense Qwen3", "dense, even"
PEERS = (SAME, DENSE, EVEN)
ROLLOUTS, UPDATE = "rollouts", "update"


class Worker:
    """A peer in a process of its own; see `rl_peers_worker.py`."""

    def __init__(self, python: Path, folder: Path, log: Path, dense: Mapping | None = None) -> None:
        threads = str(torch.get_num_threads())
        words = [python.absolute(), "-m", "benchmarks.rl_peers_worker", folder.resolve(), threads]
        words += [] if dense is None else [json.dumps(dense)]
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                env=os.environ
                | HEAP
                | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": threads},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
            )
        self.parameters = 0

    def await_model(self) -> None:
        """Wait until the model is loaded."""
        self.parameters = self.receive()["parameters"]

    def ask(self, what: str, **fields: Any) -> dict[str, Any]:
        """The answer to a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **fields}) + "\n")
        return self.receive()

    def receive(self) -> dict[str, Any]:
        """The next answer; ends the program, with what the process said, where there is none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise SystemExit(f"a peer has ended; the end of what it said:\n{said}")
        return json.loads(line)

    def turn(self, what: str, **fields: Any) -> Turn:
        """One turn of a contestant."""
        answer = self.ask(what, **fields)
        return Turn(answer["seconds"], answer["tokens"])

    def close(self) -> None:
        """End the process."""
        with self._process:  # closes its pipes and waits
            self._process.kill()


@contextmanager
def workers(python: Path, folder: Path, dense: Mapping[str, Any]) -> Iterator[dict[str, Worker]]:
    """The peers, loaded."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as logs:
        found: dict[str, Worker] = {}
        for name in PEERS:
            log = Path(logs) / f"{len(found)}.log"
            found[name] = Worker(python, folder, log, None if name == SAME else dense)
            stack.callback(found[name].close)
        for worker in found.values():
            worker.await_model()
        yield found


def dense_dimensions(config: ModelConfig) -> dict[str, Any]:
    """A Qwen3 of the width and active parameters of a model, with as many layers as that has which
    mix tokens, and with attention like its."""
    attention, width = config.attention, config.hidden_size
    assert attention is not None, "the peer takes its attention from the model, which has none"
    layers = sum(config.hybrid_override_pattern.partition("/")[0].count(kind) for kind in "M*")
    heads = attention.num_attention_heads + attention.num_key_value_heads
    around = 2 * width * heads * attention.head_dim + 2 * width + 2 * attention.head_dim
    output = config.vocab_size * width + width
    left = (model_costs(config).total_active - output) / layers - around
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": max(1, round(left / (3 * width))),
        "tie_word_embeddings": False,
    }


def agreement(
    peer: Worker, rollouts: Sequence[Rollout], *, stops: Sequence[int]
) -> dict[str, float]:
    """How far a peer with the same model is from our engine on the same answers.

    The largest difference of a log-probability, and the number of answers rewarded otherwise.
    """
    starts = [rollout.is_sampled.index(True) for rollout in rollouts]
    pairs = [*zip(rollouts, starts, strict=True)]
    answers = [rollout.ids[start:] for rollout, start in pairs]
    found = peer.ask(
        "logprobs", prompts=[rollout.ids[:start] for rollout, start in pairs], answers=answers
    )["logprobs"]
    ours = [rollout.logprobs[start:] for rollout, start in pairs]
    rows = [rollout.row for rollout in rollouts]
    judged = peer.ask("judge", rows=rows, answers=answers, stops=stops)["rewards"]
    return {
        "logprobs": max(
            abs(a - b) for x, y in zip(ours, found, strict=True) for a, b in zip(x, y, strict=True)
        ),
        "rewards": sum(r.reward != reward for r, reward in zip(rollouts, judged, strict=True)),
    }


def same_lengths(rollouts: Sequence[Rollout]) -> list[int]:
    """Lengths of as many answers as are sampled at once, distributed as those of rollouts."""
    ordered = sorted(rollout.num_sampled for rollout in rollouts)
    step = len(ordered) / AT_ONCE
    found = [ordered[int((place + 0.5) * step)] for place in range(AT_ONCE)]
    return random.Random(0).sample(found, AT_ONCE)


Contestants = Mapping[str, Callable[[int], Turn]]
"""Each does its turn of a round."""


def alternate(contestants: Contestants, *, rounds: int) -> dict[str, list[Turn]]:
    """The turns of all, in another order each round.

    Each is done twice and counts the second time: after a pause, and after another's work, a
    processor is slow, and an update follows another of its kind.
    """
    found: dict[str, list[Turn]] = {name: [] for name in contestants}
    for number, order in enumerate(turns(list(contestants), rounds=rounds)):
        for name in order:
            time.sleep(PAUSE_S)
            contestants[name](number)
            found[name].append(contestants[name](number))
        last = ", ".join(f"{name} {each[-1].seconds:.2f} s" for name, each in found.items())
        print(f"  round {number + 1} of {rounds}: {last}", flush=True)
    return found


def as_figure(name: str, found: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Tokens per second of rollouts, or seconds of an update; ratios of the turns of a round.

    A ratio above 1 says that ours is faster.
    """

    def value(turn: Turn) -> float:
        return turn.tokens / turn.seconds if name == ROLLOUTS else turn.seconds

    values = {who: [value(turn) for turn in each] for who, each in found.items()}
    ratio, interval = {}, {}
    for who in (name for name in found if name != OURS):
        pairs = zip(values[OURS], values[who], strict=True)
        ratios = [a / b if name == ROLLOUTS else b / a for a, b in pairs]
        ratio[who], interval[who] = statistics.median(ratios), median_interval(ratios)
    return {
        "name": name,
        "values": values,
        "tokens": {w: statistics.mean(turn.tokens for turn in e) for w, e in found.items()},
        "ratio": ratio,
        "interval": interval,
    }


def measure_rollouts(
    ours: Ours, peers: Mapping[str, Worker], answers: Mapping[str, Any], *, rounds: int
) -> dict[str, Any]:
    """Answers to as many different prompts as are sampled at once."""
    rows = ours.tasks(AT_ONCE * rounds, seed=1)
    each = [ours.rendered(row)[1] for row in rows]
    seeds = itertools.count()

    def prompts(number: int) -> list[list[int]]:
        return each[AT_ONCE * number : AT_ONCE * (number + 1)]

    contestants: Contestants = {
        OURS: lambda number: ours.generate(prompts(number), seed=next(seeds))
    } | {
        name: lambda number, peer=peers[name], how=answers[name]: peer.turn(
            "generate", prompts=prompts(number), **how
        )
        for name in PEERS
    }
    return as_figure(ROLLOUTS, alternate(contestants, rounds=rounds))


def measure_updates(
    ours: Ours, peers: Mapping[str, Worker], answers: Mapping[str, Any], *, rounds: int
) -> tuple[dict[str, Any], str]:
    """Whole updates, and TRL's version."""
    size = ours.prompts_per_step
    rows = ours.tasks(size * rounds, seed=2)
    twice = [row for at in range(0, len(rows), size) for row in rows[at : at + size] * 2]
    rendered = [ours.rendered(row) for row in twice]
    started = [
        peers[name].ask(
            "train",
            rows=twice,
            texts=[text for text, _ in rendered],
            prompts=[ids for _, ids in rendered],
            group=ours.group,
            prompts_per_step=size,
            learning_rate=LEARNING_RATE,
            clip_grad_norm=CLIP_GRAD_NORM,
            **answers[name],
        )
        for name in PEERS
    ]
    seeds = itertools.count()
    contestants: Contestants = {
        OURS: lambda number: ours.update(rows[size * number :][:size], seed=next(seeds))
    } | {name: lambda _, peer=peers[name]: peer.turn("step") for name in PEERS}
    return as_figure(UPDATE, alternate(contestants, rounds=rounds)), started[0]["trl"]


def stop_tokens(folder: Path) -> list[int]:
    """The tokens that end an answer."""
    stops = json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    return stops if isinstance(stops, list) else [stops]


def measure(
    folder: Path, environments: Sequence[str], *, trl_python: Path | None, rounds: int
) -> dict[str, Any]:
    """Models, agreement and figures as they are stored; no figures if the peers disagree."""
    ours = Ours(folder, environments, at_once=AT_ONCE)
    costs = model_costs(ours.model.config)
    dense = dense_dimensions(ours.model.config)
    stops, figures, trl = stop_tokens(folder), [], "left out"
    with workers(trl_python or Path(sys.executable), folder, dense) as peers:
        rollouts = ours.rollouts(ours.tasks(4 * AT_ONCE, seed=0), seed=0)
        apart = agreement(peers[SAME], rollouts[:AT_ONCE], stops=stops)
        length = round(statistics.mean(rollout.num_sampled for rollout in rollouts))
        answers = {
            name: {"stops": stops, "min_tokens": least, "max_tokens": most, "lengths": lengths}
            for name, least, most, lengths in (
                (SAME, 0, ours.max_tokens, None),
                (DENSE, 0, ours.max_tokens, same_lengths(rollouts)),
                (EVEN, length, length, None),
            )
        }
        print(
            f"log-probabilities differ by {apart['logprobs']:.1e} at most, {apart['rewards']} "
            f"rewards of {AT_ONCE} differ; answers have {length} tokens"
        )
        if apart["logprobs"] <= TOLERANCE and not apart["rewards"]:
            figures.append(measure_rollouts(ours, peers, answers, rounds=rounds))
            print(figure_line(figures[-1]), flush=True)
            if trl_python is not None:
                figure, trl = measure_updates(ours, peers, answers, rounds=rounds)
                figures.append(figure)
                print(figure_line(figure))
        else:
            print("NOT COMPARED: the programs disagree")
        parameters = {name: peer.parameters for name, peer in peers.items()}
    return {
        "trl": trl,
        "active_parameters": costs.total_active,
        "parameters": {OURS: costs.total + costs.mtp_parameters} | parameters,
        "dense": dense,
        "at_once": AT_ONCE,
        "group": ours.group,
        "mean_length": length,
        "differences": apart,
        "figures": figures,
    }


def figure_line(figure: Mapping[str, Any]) -> str:
    """A figure as a line of text."""
    unit = "tokens/s" if figure["name"] == ROLLOUTS else "s"
    cells = [f"{who} {statistics.median(v):.4g} {unit}" for who, v in figure["values"].items()]
    ratios = [
        f"{ratio:.2f}x ({figure['interval'][who][0]:.2f} to {figure['interval'][who][1]:.2f}) {who}"
        for who, ratio in figure["ratio"].items()
    ]
    return f"{figure['name']:10}{', '.join(cells)}   {', '.join(ratios)}"


def peers_in_words(result: Mapping[str, Any]) -> str:
    """Sizes and agreement, for the page."""
    millions = {name: f"{count / 1e6:.2f}M" for name, count in result["parameters"].items()}
    return (
        f"{result['active_parameters'] / 1e6:.2f}M active parameters of {millions[OURS]} with MTP; "
        f"the dense model has {millions[DENSE]} with its input table, and "
        f"{result['dense']['num_hidden_layers']} layers. Answers have {result['mean_length']} "
        f"tokens in the mean. Log-probabilities of a batch of rollouts differ by "
        f"{result['differences']['logprobs']:.0e} at most, rewards by none. TRL {result['trl']}."
    ) + _busy_in_words(result["machine"]["others"])


def _busy_in_words(share: float | None) -> str:
    if share is None or share <= MOST_OTHERS:
        return ""
    return f" **Other programs took {share:.0%} of the processors: these figures are noise.**"


def peers_table(result: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table of the page; the first one is its header."""
    rows = [["", OURS, *PEERS, *(f"against {name}" for name in PEERS)]]
    for figure in result["figures"]:
        is_rate = figure["name"] == ROLLOUTS
        label = (
            f"rollouts, {result['at_once']} at once, tokens/s"
            if is_rate
            else f"an update, {result['at_once'] // result['group']} prompts x {result['group']}, s"
        )
        medians = [statistics.median(figure["values"][name]) for name in (OURS, *PEERS)]
        cells = [f"{x:,.0f}" if is_rate else f"{x:.2f}" for x in medians]
        spans = [figure["interval"][name] for name in PEERS]
        ratios = [
            f"{figure['ratio'][name]:.2f}x ({low:.2f} to {high:.2f})"
            for name, (low, high) in zip(PEERS, spans, strict=True)
        ]
        rows.append([label, *cells, *ratios])
    return rows


def main(
    arguments: Sequence[str] | None = None,
    environments: Sequence[str] = tuple(each.name for each in tiny_rl().environments),
) -> None:
    """Measure, print and write the result; environments of several turns are left out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a model directory that answers chats")
    parser.add_argument("--trl-python", type=Path, metavar="PATH", help="a Python that has TRL")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    given = parser.parse_args(arguments)
    if given.trl_python is None:
        print("updates are left out: no --trl-python PATH to a Python that has TRL\n")
    elif not given.trl_python.exists():
        parser.error(f"{given.trl_python} does not exist")
    before = machine.load_average()
    machine.warn_if_busy(before)
    retain_freed_memory()  # the peers' processes are started with the same
    torch.set_num_threads(given.threads)
    others = machine.OtherPrograms()
    measured = measure(given.model, environments, trl_python=given.trl_python, rounds=given.rounds)
    share = others.share()
    print(_busy_in_words(share))
    load = {"load_before": before, "load_after": machine.load_average(), "others": share}
    target = machine.write_result(
        "rl_peers", measured, arguments=arguments, about=load, folder=given.out
    )
    print(f"\n{target}")


if __name__ == "__main__":
    main()
