"""The worker process of `benchmarks.rl_peers`: transformers and TRL with one of two models.

    python -m benchmarks.rl_peers_worker MODEL THREADS [DENSE]

MODEL is the directory of the policy. With DENSE, the dimensions of a dense transformer as JSON, its
weights are random and only the tokenizer is that of MODEL. A line on standard input is a command in
JSON, a line on standard output its answer; what the libraries print goes to standard error.

`generate` is transformers' `generate`. `train` starts TRL's trainer, which then makes an update
whenever a line says so. The trainer's own loop runs between two lines: fetching prompts, sampling,
rewards, loss, gradient and AdamW.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.models import load_theirs
from torch import Tensor, nn

from nemotron3.environments.environment import Environment
from nemotron3.environments.registry import load_environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, environment_of
from nemotron3.text import AssistantMessage, ResponseParser, Tokenizer

Command = Mapping[str, Any]


class Socket:
    """Lines of JSON on standard input and output."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print

    def receive(self) -> Command | None:
        """The next command; None at the end."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def send(self, answer: Mapping[str, Any]) -> None:
        """Answer a command."""
        self._out.write(json.dumps(answer) + "\n")


def dense_model(dimensions: Mapping[str, Any]) -> nn.Module:
    """A dense transformer with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415 - takes seconds

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**dimensions)).eval()


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids [rows, longest], and 1 where there is one."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        at = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[place, at], mask[place, at] = torch.tensor(row), 1
    return ids, mask


@torch.inference_mode()
def logprobs(model: nn.Module, command: Command) -> dict[str, Any]:
    """Log-probabilities of the tokens of answers, in the padded batch that TRL makes."""
    prompts, mask = padded(command["prompts"], left=True)
    answers, answer_mask = padded(command["answers"], left=False)
    logits = model(
        input_ids=torch.cat([prompts, answers], 1),
        attention_mask=torch.cat([mask, answer_mask], 1),
        use_cache=False,
    ).logits[:, prompts.shape[1] - 1 : -1]
    found = logits.log_softmax(-1).gather(2, answers[:, :, None])[:, :, 0]
    lengths = [len(answer) for answer in command["answers"]]
    return {"logprobs": [row[:n].tolist() for row, n in zip(found, lengths, strict=True)]}


class EndsAt:
    """A logits processor that ends every answer of a batch at a length of its own."""

    def __init__(self, prompt: int, lengths: Sequence[int], stops: Sequence[int]) -> None:
        """`prompt` is the length of the padded prompts."""
        self._prompt, self._lengths, self._stops = prompt, torch.tensor(lengths), list(stops)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Only a stop token where an answer ends, and none elsewhere."""
        ends = self._lengths == ids.shape[1] - self._prompt + 1
        scores[:, self._stops] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, self._stops[0]] = 0.0
        return scores


def fix_lengths(model: Any, lengths: Sequence[int], stops: Sequence[int]) -> None:
    """Have `generate` give batches of these lengths, whoever calls it."""
    plain = type(model).generate.__get__(model)

    def generate(*args: Any, **options: Any) -> Tensor:
        processor = EndsAt(options["input_ids"].shape[1], lengths, stops)
        return plain(*args, logits_processor=[processor], **options)

    model.generate = generate


@torch.inference_mode()
def generate(model: Any, command: Command) -> dict[str, Any]:
    """Sample an answer to each prompt.

    An answer's tokens count to its own end, and the time until all have ended.
    """
    stops = command["stops"]
    if command["lengths"]:
        fix_lengths(model, command["lengths"], stops)
    start = time.perf_counter()
    ids, mask = padded(command["prompts"], left=True)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_new_tokens=command["min_tokens"],
        max_new_tokens=command["max_tokens"],
        eos_token_id=stops,
        pad_token_id=0,
    )
    seconds = time.perf_counter() - start
    answers = out[:, ids.shape[1] :].tolist()
    return {"seconds": seconds, "tokens": sum(_length(answer, stops) for answer in answers)}


def _length(answer: Sequence[int], stops: Sequence[int]) -> int:
    ends = [place for place, token in enumerate(answer) if token in stops]
    return ends[0] + 1 if ends else len(answer)


class Judge:
    """Our environments, for answers of one turn in token ids."""

    def __init__(self, folder: Path, stops: Sequence[int]) -> None:
        self._tokenizer, self._stops = Tokenizer.from_directory(folder), set(stops)
        self._environments: dict[str, Environment] = {}

    def rewards(self, answers: Sequence[Sequence[int]], rows: Sequence[Row]) -> list[float | None]:
        """The reward of each answer to each row; None where a judge failed."""
        return asyncio.run(self._judge(answers, rows))

    async def _judge(
        self, answers: Sequence[Sequence[int]], rows: Sequence[Row]
    ) -> list[float | None]:
        pairs = zip(answers, rows, strict=True)
        return await asyncio.gather(*(self._reward(ids, row) for ids, row in pairs))

    async def _reward(self, ids: Sequence[int], row: Row) -> float | None:
        name = environment_of(row)
        if name not in self._environments:
            self._environments[name] = load_environment(name)
        environment = self._environments[name]
        parser = ResponseParser(self._tokenizer, is_reasoning_open=True)
        parser.push(ids)
        parser.finish()
        said = parser.response()
        turn = AssistantMessage(content=said.content, reasoning=said.reasoning or None)
        response = TaskResponse(messages=(turn,), is_complete=ids[-1] in self._stops)
        session = await environment.seed_session(row)
        return (await environment.verify(row, response, session)).reward


def train(model: Any, folder: Path, socket: Socket, command: Command) -> None:
    """Have TRL's trainer make updates of the prompts, `group` answers each, one for each line."""
    if command["lengths"]:
        fix_lengths(model, command["lengths"], command["stops"])
    from datasets import Dataset  # noqa: PLC0415 - TRL is only where the worker trains
    from transformers import AutoTokenizer, TrainerCallback  # noqa: PLC0415
    from trl import GRPOConfig, GRPOTrainer  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    judge, counted = Judge(folder, command["stops"]), [0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, ids in zip(command["texts"], command["prompts"], strict=True):
        assert tokenizer(text)["input_ids"] == ids, f"other tokens of {text!r}"

    def environments(
        completion_ids: Sequence[Sequence[int]], row: Sequence[str], **_: Any
    ) -> list[float | None]:
        """TRL's reward function; rows are JSON, since a data set's columns are of one type."""
        counted[0] = sum(len(ids) for ids in completion_ids)
        return judge.rewards(completion_ids, [json.loads(text) for text in row])

    class Turns(TrainerCallback):
        """Waits for a line before each update, and answers after it."""

        started = 0.0

        def _await_line(self) -> None:
            if socket.receive() is None:
                raise SystemExit("the benchmark has ended")
            self.started = time.perf_counter()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            socket.send({"trl": version("trl")})
            self._await_line()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds = time.perf_counter() - self.started
            socket.send({"seconds": seconds, "tokens": counted[0]})
            self._await_line()

    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model,
            reward_funcs=environments,
            args=GRPOConfig(
                output_dir=out,
                max_steps=len(command["rows"]) // command["prompts_per_step"],
                per_device_train_batch_size=command["prompts_per_step"] * command["group"],
                num_generations=command["group"],
                max_completion_length=command["max_tokens"],
                generation_kwargs={"min_new_tokens": command["min_tokens"]},
                learning_rate=command["learning_rate"],
                lr_scheduler_type="constant",
                max_grad_norm=command["clip_grad_norm"],
                router_aux_loss_coef=0.0,
                gradient_checkpointing=False,  # it would be slower
                shuffle_dataset=False,
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(
                [
                    {"prompt": text, "row": json.dumps(row)}
                    for text, row in zip(command["texts"], command["rows"], strict=True)
                ]
            ),
            processing_class=tokenizer,
            callbacks=[Turns()],
        )
        trainer.train()


def answered(command: Command, model: nn.Module, folder: Path) -> dict[str, Any]:
    """The answer to a command that needs no TRL."""
    match command["do"]:
        case "logprobs":
            return logprobs(model, command)
        case "judge":
            judge = Judge(folder, command["stops"])
            return {"rewards": judge.rewards(command["answers"], command["rows"])}
        case "generate":
            return generate(model, command)
    raise ValueError(f"command {command['do']!r} is none of logprobs, judge, generate, train")


def main(arguments: Sequence[str]) -> None:
    """Answer the lines of standard input until it ends."""
    socket, folder = Socket(), Path(arguments[0])
    torch.set_num_threads(int(arguments[1]))
    dense = json.loads(arguments[2]) if len(arguments) > 2 else None
    model = load_theirs(folder) if dense is None else dense_model(dense)
    socket.send({"parameters": sum(p.numel() for p in model.parameters())})
    while (command := socket.receive()) is not None:
        if command["do"] == "train":
            train(model, folder, socket, command)
        else:
            socket.send(answered(command, model, folder))


if __name__ == "__main__":
    main(sys.argv[1:])
