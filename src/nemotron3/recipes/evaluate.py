"""Evaluates a model directory: environments, held-out text and public tasks, in this process."""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from nemotron3.data import FilesConfig
from nemotron3.data.chat_tokens import check_chat_tokens
from nemotron3.data.documents import find_files
from nemotron3.environments.environment import Environment
from nemotron3.errors import ConfigError
from nemotron3.evaluation.environments import (
    held_out_tasks,
    play_tasks,
    results_by_environment,
)
from nemotron3.evaluation.results import Evaluation, EvaluationSettings, HarnessResult
from nemotron3.evaluation.text import TextResult, evaluate_text
from nemotron3.inference.base_llm import load_model, name_of, tokenizer_directory
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.recipes.chat_model import chat_template_for
from nemotron3.recipes.input_files import check_model_directory
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.rl.prompts import check_prompts
from nemotron3.rl.records import RolloutRecord
from nemotron3.rl.rollouts import RolloutDriver
from nemotron3.runtime.devices import describe_device, resolve_device
from nemotron3.text import Tokenizer

_WHEN = "held-out tasks"


@dataclass(frozen=True, kw_only=True)
class HarnessTasks:
    """Tasks of lm-evaluation-harness."""

    names: tuple[str, ...]
    include_path: Path | None = None
    """A folder with task files of one's own."""
    num_fewshot: int | None = None
    """Solved questions before each; None for what a task says."""
    limit: int | None = None
    """Questions of each task, the first ones; None for all."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is measured, and how."""

    settings: EvaluationSettings
    environments: Mapping[str, Environment] = field(default_factory=dict[str, Environment])
    texts: tuple[FilesConfig, ...] = ()
    harness: HarnessTasks | None = None
    device: str = "auto"
    dtype: torch.dtype | None = None
    """What the weights are held in; None for as they are stored."""
    chat_style: str | None = None
    """The release whose chat template is used; None for the one in the model's directory."""
    max_num_seqs: int = 128
    """Answers that are sampled at once."""
    lora: Path | None = None
    """The directory of an adapter that is merged into the model."""


def evaluate_directory(
    path: Path, plan: EvaluationPlan, *, callback: RunCallback | None = None
) -> Evaluation:
    """Measure the model of a directory by a plan.

    What cannot be measured is an error before the model is read: a path without text, an
    environment without tasks enough, prompts that leave no room to answer, a vocabulary without the
    tokens of chats, a missing package.
    """
    callback = callback or RunCallback()
    check_model_directory(path)
    if not (plan.environments or plan.texts or plan.harness):
        raise ConfigError(
            "nothing to measure; name an environment (--environment math), text (--data held.txt) "
            "or tasks of lm-evaluation-harness (--tasks arc_easy)"
        )
    for files in plan.texts:
        find_files(files.path)
    score_tasks = _harness(plan.harness)
    settings, device = plan.settings, resolve_device(plan.device)
    config = EngineConfig(max_num_seqs=plan.max_num_seqs, max_draft_tokens=0)
    rows = {
        name: held_out_tasks(environment, settings.num_tasks, seed=settings.seed)
        for name, environment in plan.environments.items()
    }
    tokenizer = Tokenizer.from_directory(tokenizer_directory(path, plan.lora))
    template = None
    if rows:
        check_chat_tokens(tokenizer, with_tools=any(e.tools for e in plan.environments.values()))
        template = chat_template_for(plan.chat_style, tokenizer, str(path))
        every = [row for own in rows.values() for row in own]
        check_prompts(every, settings.rollouts, template, tokenizer)

    callback.stage(f"Reading {path}")
    model = load_model(path, device=plan.device, dtype=plan.dtype, lora=plan.lora).eval()
    texts: dict[str, TextResult] = {}
    for files in plan.texts:
        callback.stage(f"Reading {files.path} with the model")
        texts[files.path] = evaluate_text(model, tokenizer, files, seq_len=settings.seq_len)
    played: list[RolloutRecord] = []
    if template is not None:
        bounded = replace(config, max_model_len=settings.rollouts.max_context)
        llm = LLM(model, tokenizer=tokenizer, config=bounded)
        driver = RolloutDriver(llm, tokenizer, template, plan.environments, settings.rollouts)
        total = sum(map(len, rows.values()))

        def on_ended(count: int, before: int) -> None:
            callback.progress("held-out tasks", before + count, total)

        for name, own in rows.items():
            callback.stage(f"Playing {len(own)} held-out tasks of {name}")
            told = partial(on_ended, before=len(played))
            played += play_tasks(driver, own, when=_WHEN, seed=settings.seed, on_ended=told)
    found: dict[str, HarnessResult] = {}
    if plan.harness is not None:
        callback.stage(f"Scoring {', '.join(plan.harness.names)}")
        found = score_tasks(LLM(model, tokenizer=tokenizer, config=config))
    return Evaluation(
        name=name_of(path) if plan.lora is None else str(plan.lora),
        model=str(path),
        command=" ".join(["nemotron3", *sys.argv[1:]]),
        device=describe_device(device),
        settings=plan.settings,
        environments=results_by_environment(played),
        texts=texts,
        harness=found,
        tasks=tuple(played),
    )


def _harness(tasks: HarnessTasks | None) -> Callable[[LLM], dict[str, HarnessResult]]:
    """What scores the tasks. It imports the harness, which is optional and takes seconds."""
    if tasks is None:
        return lambda _: {}
    harness = importlib.import_module("nemotron3.evaluation.harness")
    harness.check_tasks(tasks.names, tasks.include_path)
    return lambda llm: harness.evaluate_tasks(
        llm,
        tasks.names,
        include_path=tasks.include_path,
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
    )
