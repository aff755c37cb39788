"""Rollouts ahead of the trainer in a run: the generator, its share of the processors, its losses.

Rollouts that were played and not trained on are lost when a run is interrupted: it goes on from its
last checkpoint and plays them again with other weights. The run's folder keeps how many were played
for each update, `buffer.jsonl`, so that the lost ones are counted.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from nemotron3.models.lora import changed_parameters, with_own_changes
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_player import own_player
from nemotron3.recipes.rl_process import ProcessPlayer
from nemotron3.recipes.run_folder import RunFolder
from nemotron3.rl.generator import AsyncConfig, Player, RolloutGenerator
from nemotron3.rl.groups import UpdateRollouts
from nemotron3.rl.weight_sync import PublishedWeights

_BUFFER_FILE = "buffer.jsonl"


class RolloutsAhead:
    """Plays the rollouts of a run's updates while it trains; a context that ends with training."""

    def __init__(self, run: RLRun, config: AsyncConfig, folder: RunFolder[RLRun]) -> None:
        self._run, self._config, self._folder = run, config, folder
        self._threads = self._threads_before = torch.get_num_threads()
        self._weights: PublishedWeights | None = None
        self._model: LanguageModel | None = None
        """That whose weights are published."""
        self._generator: RolloutGenerator | None = None
        self._dropped = 0

    def __enter__(self) -> "RolloutsAhead":
        self._threads = self._threads_before = torch.get_num_threads()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._generator is not None:
            self._generator.close()
            self._generator = None
        torch.set_num_threads(self._threads_before)

    def publish(self, model: LanguageModel, version: int) -> None:
        """Offer the weights after so many updates; the first ones begin the play."""
        if self._generator is None:
            self._generator = self._begin(model, version)
        self._generator.publish(model, version)

    def take(self, step: int, *, say: Callable[[str], None]) -> UpdateRollouts:
        """The rollouts of the update that follows so many updates."""
        assert self._generator is not None, "weights are published first"
        return self._generator.take(step, say=say)

    def share_processors(self, *_: object) -> None:
        """Give the calling thread, the trainer's, the processors that the engine does not use."""
        if self._generator is None:
            return
        threads = self._generator.trainer_threads()
        if threads != self._threads:
            self._threads = threads
            torch.set_num_threads(threads)

    def metrics(self) -> dict[str, float]:
        """Waiting, restarts, and the rollouts of this run that interruptions have lost."""
        assert self._generator is not None, "rollouts are taken first"
        return self._generator.metrics() | {"async/dropped": float(self._dropped)}

    def _begin(self, model: LanguageModel, first: int) -> RolloutGenerator:
        file = self._folder.path / _BUFFER_FILE
        self._dropped = dropped_rollouts(file, first)
        # The model that plays for an adapter has merged copies, which have no gradients.
        lora, self._model = self._run.lora, model
        names = None if lora is None else changed_parameters(model, lora)
        self._weights = PublishedWeights(model, names)
        return RolloutGenerator(
            self._player,
            self._weights,
            self._config,
            first=first,
            last=self._run.training.steps,
            threads=self._threads_before,
            on_played=partial(_note_played, file),
        )

    def _player(self, on_step: Callable[[], None], say: Callable[[str], None]) -> Player:
        run, device, folder = self._run, self._folder.device, self._folder.path
        if self._config.engine == "process":
            assert self._weights is not None
            return ProcessPlayer(
                run,
                self._weights,
                device=device,
                folder=folder,
                on_step=on_step,
                say=say,
            )
        model = None
        if run.lora is not None:  # what does not change is in memory once
            assert self._model is not None
            model = with_own_changes(self._model, run.lora)
        return own_player(run, model=model, device=device, folder=folder, on_step=on_step, say=say)


def dropped_rollouts(file: Path, first: int) -> int:
    """Rollouts that a run has played in vain, where it goes on from update `first`.

    Those of updates from `first` on, and those of earlier updates that were played again later.
    """
    if not file.exists():
        return 0
    played = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    used = {each["update"]: each["rollouts"] for each in played if each["update"] < first}
    return sum(each["rollouts"] for each in played) - sum(used.values())


def _note_played(file: Path, step: int, played: UpdateRollouts) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"update": step, "rollouts": len(played.played)}) + "\n")
