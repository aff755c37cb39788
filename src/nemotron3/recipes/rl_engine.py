"""One engine that plays the tasks of a reinforcement learning run in this process."""

from collections.abc import Callable, Mapping, Sequence

import torch

from nemotron3.environments.environment import Environment
from nemotron3.environments.registry import load_environment
from nemotron3.environments.rows import Row
from nemotron3.errors import ConfigError
from nemotron3.evaluation.environments import check_name
from nemotron3.inference.llm import LLM
from nemotron3.inference.model_runner.weights import RunningRequests
from nemotron3.models.huggingface import read_config
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.backends import recorded_backends
from nemotron3.recipes.adapters import model_to_play
from nemotron3.recipes.chat_model import chat_template_for
from nemotron3.recipes.memory import bytes_for_keys
from nemotron3.recipes.rl import RLRun
from nemotron3.rl.rollouts import OnEnded, Rollout, RolloutDriver
from nemotron3.rl.weight_sync import PublishedWeights, SharedWeights, weights_checksum
from nemotron3.text import Tokenizer


class RolloutEngine:
    """Environments, an engine and what drives it."""

    def __init__(
        self,
        run: RLRun,
        model: LanguageModel,
        environments: Mapping[str, Environment],
        *,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        """`on_step` is that of `RolloutDriver`."""
        self.model = model
        self.num_restarts = 0
        """What fails in it is raised."""
        self.backends: dict[str, str] = {}
        """What operations ran on, as `recorded_backends` has it."""
        self._checksums: dict[int, int] = {}
        tokenizer = Tokenizer.from_directory(run.model)
        config = run.engine_config(kv_cache_bytes=bytes_for_keys(run, model.device))
        self._llm = LLM(model, tokenizer=tokenizer, config=config)
        self._driver = RolloutDriver(
            self._llm,
            tokenizer,
            chat_template_for(run.chat_style, tokenizer, run.model),
            environments,
            run.rollouts,
            on_step=on_step,
        )

    def play(
        self,
        rows: Sequence[Row],
        *,
        group_size: int = 1,
        seed: int = 0,
        effort_fraction: float = 0.0,
        places: Sequence[int] | None = None,
        on_ended: OnEnded = lambda _: None,
    ) -> list[Rollout]:
        """`RolloutDriver.play`, of weights, tasks and seed alone: no prefix is in the cache.

        Rollouts have the checksums of weights that were installed.
        """
        self._llm.reset_prefix_cache()
        with recorded_backends() as backends:
            played = self._driver.play(
                rows,
                group_size=group_size,
                seed=seed,
                effort_fraction=effort_fraction,
                places=places,
                on_ended=on_ended,
            )
        self.backends |= backends
        for rollout in played:
            known = rollout.versions & self._checksums.keys()
            rollout.weight_checksums = {version: self._checksums[version] for version in known}
        newest = max(self._checksums, default=0)
        self._checksums = {v: c for v, c in self._checksums.items() if v == newest}
        return played

    def renew(self, version: int, *, running: RunningRequests = "recompute") -> None:
        """Forget what the weights of earlier versions computed."""
        if version > self._llm.weight_version:
            self._llm.invalidate_caches(version=version, running=running)

    def install(
        self, weights: PublishedWeights | SharedWeights, *, running: RunningRequests
    ) -> int:
        """Take up the newest weights, into a model of its own; returns their version."""
        version = weights.write_into(self.model)
        self.renew(version, running=running)
        self._checksums[version] = weights_checksum(self.model)
        return version

    def use_threads(self, count: int) -> None:
        """Compute with so many threads from the next step on; they are the calling thread's."""
        torch.set_num_threads(count)

    def close(self) -> None:
        """Nothing goes on when `play` has ended."""


def own_engine(
    run: RLRun,
    environments: Mapping[str, Environment],
    *,
    device: torch.device,
    on_step: Callable[[], None],
    model: LanguageModel | None = None,
) -> RolloutEngine:
    """An engine whose `model` takes up the trainer's weights by `install`; None reads one."""
    if model is None:
        precision = run.training.precision
        model = model_to_play(run.model, run.lora, precision=precision, device=device)
    return RolloutEngine(run, model.eval(), environments, on_step=on_step)


def run_environments(run: RLRun) -> dict[str, Environment]:
    """A run's environments by name, in its order."""
    environments: dict[str, Environment] = {}
    for config in run.environments:
        environment = load_environment(config.name, difficulty=config.difficulty)
        if environment.name in environments:
            raise ConfigError(
                f"environments has two named {environment.name!r}; a batch has each once"
            )
        check_name(environment)
        environments[environment.name] = environment
    return environments


def check_drafts(run: RLRun) -> None:
    """Raises ConfigError for drafts of a model that has no block to make them."""
    if run.max_draft_tokens and not read_config(run.model).mtp_layers:
        raise ConfigError(
            f"is {run.max_draft_tokens}, but {run.model} has no multi-token-prediction block; set "
            "it to 0",
            field="max_draft_tokens",
        )
