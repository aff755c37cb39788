"""A cell: one arm with one learning rate and one seed, trained and looked at after every stage."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.data.chat_tokens import check_chat_tokens
from nemotron3.environments.environment import Environment
from nemotron3.environments.registry import load_environment
from nemotron3.environments.rows import Row
from nemotron3.errors import DataError, DivergenceError
from nemotron3.evaluation.environments import (
    held_out_tasks,
    play_tasks,
    results_by_environment,
)
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.llm import LLM
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.observe.metrics import read_metrics
from nemotron3.recipes.chat_model import chat_template_for
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.run_folder import METRICS_FILE, MODEL_FOLDER, RunCallback
from nemotron3.recipes.run_rl import rl
from nemotron3.rl.prompts import check_prompts
from nemotron3.rl.records import RolloutRecord
from nemotron3.rl.rollouts import RolloutDriver
from nemotron3.runtime.devices import resolve_device
from nemotron3.studies.simultaneous_rl.arms import Cell, parts_of, profiling_rollouts, run_of
from nemotron3.studies.simultaneous_rl.config import SimultaneousRL
from nemotron3.studies.study import Stopwatch, kept
from nemotron3.text import Tokenizer
from nemotron3.training.trainer import model_weights


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a policy reached on the held-out tasks of one environment."""

    reward: float
    """Mean of the rollouts that have one."""
    most_common: float
    """Share of the most common answer: it rises where one answer is learned for all tasks."""
    num_tasks: int
    """Rollouts that have a reward."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All environments, sampled at temperature 1, after so many updates."""

    updates: int
    scores: dict[str, Score]
    """By environment."""

    @property
    def mean(self) -> float:
        """Mean reward of the environments."""
        return sum(score.reward for score in self.scores.values()) / len(self.scores)


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What is kept of a cell."""

    cell: Cell
    failure: str | None
    """Why the training could not go on to its end, such as a gradient that is not finite."""
    evaluations: tuple[Evaluation, ...]
    """Of the model that every cell starts from, and after every stage."""
    rollouts: int
    """Those of updates."""
    profiling_rollouts: int
    """Those that measured pass rates for a curriculum."""
    tokens: int
    """Sampled in the rollouts of updates."""
    without_variance: float
    """Share of the rollouts whose group has equal rewards, and which teach nothing."""
    grad_norms: tuple[float, ...]
    """Of every update, before clipping."""
    seconds: float
    """Wall time of training and evaluations."""


class HeldOut:
    """Held-out tasks of all environments, and a policy of one architecture that plays them."""

    def __init__(self, run: RLRun, *, num_tasks: int) -> None:
        """Reads the model of the run, whose settings decide how tasks are played."""
        tokenizer = Tokenizer.from_directory(run.model)
        template = chat_template_for(run.chat_style, tokenizer, run.model)
        device = resolve_device(run.device)
        self._model = LanguageModel.from_pretrained(run.model, device=device, dtype=torch.float32)
        environments: dict[str, Environment] = {}
        self._rows: list[Row] = []
        for config in run.environments:
            one = load_environment(config.name, difficulty=config.difficulty)
            environments[one.name] = one
            self._rows += held_out_tasks(one, num_tasks)
        has_tools = any(environment.tools for environment in environments.values())
        check_chat_tokens(tokenizer, with_tools=has_tools)
        check_prompts(self._rows, run.rollouts, template, tokenizer)
        self._llm = LLM(
            self._model,
            tokenizer=tokenizer,
            config=EngineConfig(
                max_num_seqs=run.max_num_seqs,
                max_model_len=run.rollouts.max_context,
                max_draft_tokens=0,
            ),
        )
        self._driver = RolloutDriver(self._llm, tokenizer, template, environments, run.rollouts)

    def play(self, *, updates: int, weights: Mapping[str, Tensor] | None = None) -> Evaluation:
        """A rollout of every task, by `weights` or by the model as it is."""
        if weights is not None:
            self._model.load_state_dict(weights)
            self._llm.invalidate_caches()
        self._llm.reset_prefix_cache()  # what was played before must not change the rounding
        played = play_tasks(self._driver, self._rows, when=f"after {updates} updates")
        return Evaluation(updates=updates, scores=scores_of(played))


def scores_of(played: Sequence[RolloutRecord]) -> dict[str, Score]:
    """The score of each environment; DataError where every rollout of one failed."""
    scores: dict[str, Score] = {}
    for name, found in results_by_environment(played).items():
        if found.reward is None:
            failure = next(each.failure for each in played if each.environment == name)
            raise DataError(
                f"all {found.num_failures} held-out tasks of {name} failed; the first: {failure}"
            )
        scores[name] = Score(
            reward=found.reward.mean,
            most_common=found.top_answer_share,
            num_tasks=found.reward.n,
        )
    return scores


def run_cell(
    study: SimultaneousRL,
    cell: Cell,
    *,
    steps: int,
    start: Evaluation,
    held_out: HeldOut,
    work: Path,
    callback: RunCallback,
) -> CellResult:
    """Train and evaluate a cell in the folder `work`, from where it stands there.

    Training that cannot go on, because it has diverged or finds nothing to learn from, is a result.
    """
    parts, stage = parts_of(study, cell.arm, steps), steps // study.num_stages
    evaluations, failure, folders = [start], None, list[Path]()
    model, updates = study.run.model, 0
    with Stopwatch(work / "seconds.json") as stopwatch:
        try:
            for index, part in enumerate(parts):
                run = run_of(
                    study,
                    part,
                    index,
                    cell=cell,
                    model=model,
                    stage=stage,
                )
                folder = work / run.name
                folders.append(folder)
                rl(run, runs=work, callback=callback)
                evaluations += _evaluations(folder, part.steps, stage, updates, held_out)
                # The next part starts from this model, and its checkpoints have been looked at.
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                if index:
                    shutil.rmtree(folders[-2] / MODEL_FOLDER, ignore_errors=True)
                model, updates = str(folder / MODEL_FOLDER), updates + part.steps
        except (DivergenceError, DataError) as error:
            failure = f"{type(error).__name__}: {error}"
    metrics = [
        values
        for folder in folders
        if (folder / METRICS_FILE).exists()
        for _, values in read_metrics(folder / METRICS_FILE)
    ]
    played = sum(values["rollouts/played"] for values in metrics)
    trained = sum(values["rollouts/trained"] for values in metrics)
    return CellResult(
        cell=cell,
        failure=failure,
        evaluations=tuple(evaluations),
        rollouts=round(played),
        profiling_rollouts=profiling_rollouts(parts),
        tokens=round(sum(v["rollouts/played"] * v["rollouts/tokens"] for v in metrics)),
        without_variance=1 - trained / played if played else 0.0,
        grad_norms=tuple(values["optim/grad_norm"] for values in metrics),
        seconds=stopwatch.seconds,
    )


def _evaluations(
    folder: Path, steps: int, stage: int, before: int, held_out: HeldOut
) -> list[Evaluation]:
    """Of the checkpoints of a finished part, each made once and kept in a file."""
    store = CheckpointStore(folder / "checkpoints")

    def of(step: int) -> Evaluation:
        return held_out.play(updates=before + step, weights=model_weights(store.load(step)))

    return [
        kept(folder / f"evaluation-{step}.json", Evaluation, lambda step=step: of(step))
        for step in range(stage, steps + 1, stage)
    ]
