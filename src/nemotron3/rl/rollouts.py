"""Rollouts: a policy plays tasks of environments, and every token that it samples is kept.

Many turns are token-in, token-out. The prompt of a turn is the ids of everything before it, the
policy's own as it sampled them, and then the new ids of what a tool or the user said. Nothing that
was generated is tokenized again: its text may have other ids, whose log-probabilities nobody has.

What fails without the policy's fault (a judge, a tool, the engine, an environment that raises) is
tried again, and after `max_attempts` it is a rollout without a reward, which is counted and never
trained on. Of an environment that raises in every rollout, `check_rewards` tells the error.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from torch import Tensor

from nemotron3.environments.environment import Environment, call_problem
from nemotron3.environments.failures import ErrorLog, failure_of_error
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, environment_of, prompt_of, tools_of
from nemotron3.environments.verification import Failure, FailureKind, Verification
from nemotron3.errors import ConfigError
from nemotron3.inference.llm import LLM
from nemotron3.inference.output_processor import CompletionOutput, Prompt
from nemotron3.inference.requests import SamplingParams
from nemotron3.rl.turns import turn_of
from nemotron3.text import (
    AssistantMessage,
    ChatTemplate,
    Message,
    RenderedChat,
    Tokenizer,
    Tool,
    ToolMessage,
    UserMessage,
)

OnEnded = Callable[[int], None]
"""Hears now and then how many rollouts of a play have ended so far."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How tasks are played."""

    max_tokens: int = 256
    """Most tokens of one turn."""
    max_context: int = 1024
    """Most tokens of a whole rollout, prompt included."""
    temperature: float = 1.0
    """Of the sampling; training assumes 1, and 0 takes the most probable tokens."""
    enable_thinking: bool = True
    """Whether turns begin with open reasoning."""
    reasoning_budget: int | None = None
    """Most tokens of reasoning in a turn; null for no limit."""
    effort_fraction: float = 0.0
    """Share of the training prompts that ask for little effort, 0.02 for Super; their rewards are
    shaped by `shaping.effort`."""
    effort: str = "low"
    """An effort of the model's chat template."""
    max_attempts: int = 2
    """How often a rollout is tried that fails without the policy's fault."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_context", "max_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"is {getattr(self, name)}; it must be 1 or more", field=f"rollouts.{name}"
                )
        if not 0 <= self.effort_fraction <= 1:
            raise ConfigError(
                f"is {self.effort_fraction}; it must be from 0 to 1",
                field="rollouts.effort_fraction",
            )
        if not self.temperature >= 0:
            raise ConfigError(
                f"is {self.temperature}; it must be 0 or more",
                field="rollouts.temperature",
            )


def render_prompt(
    row: Row, config: RolloutConfig, template: ChatTemplate, *, effort: str | None = None
) -> RenderedChat:
    """What a policy reads of a task before its first turn."""
    return template.render(
        prompt_of(row),
        tools=tools_of(row),
        enable_thinking=config.enable_thinking,
        truncate_history_thinking=False,
        effort=effort,
    )


@dataclass(frozen=True, kw_only=True)
class SampledTurn:
    """What the policy wrote in one turn, as a range of the rollout's tokens."""

    start: int
    end: int
    has_invalid_call: bool
    """Whether it has a call that is broken off, or that no tool takes."""
    is_malformed: bool
    """Whether its reasoning tags do not match: it must close what the prompt has opened, once."""


@dataclass(kw_only=True)
class Rollout:
    """One play of a task."""

    row: Row
    group: int
    """Rollouts of the same task have the same number."""
    ids: list[int]
    """Every token, prompt included."""
    is_sampled: list[bool]
    """Which of them the policy sampled."""
    logprobs: list[float]
    """Log-probability of each when it was sampled; 0 for the others."""
    weight_versions: list[int]
    """Of the weights that each was sampled with; 0 for the others."""
    weight_checksums: dict[int, int] = field(default_factory=dict[int, int])
    """Checksums of these weights in an engine with a copy of its own, by version."""
    continues_old_states: bool = False
    """Whether tokens were sampled from states of earlier weights than their own, as after an update
    with `running="keep"`: no forward pass of one version has their log-probabilities."""
    messages: list[Message] = field(default_factory=list[Message])
    """What followed the prompt."""
    routes: Tensor | None = None
    """Experts of every token but the last in every mixture of the backbone, int16 [tokens, layers,
    choices], from an engine with `return_routed_experts`."""
    turns: list[SampledTurn] = field(default_factory=list[SampledTurn])
    effort: str | None = None
    """The effort that the prompt asks for."""
    is_cut: bool = False
    """Whether a limit of tokens or turns ended it."""
    verification: Verification | None = None
    attempts: int = 1

    @cached_property
    def environment(self) -> str:
        """Its name."""
        return environment_of(self.row)

    @property
    def reward(self) -> float | None:
        """None where something failed."""
        return None if self.verification is None else self.verification.reward

    @property
    def num_turns(self) -> int:
        """Turns of the policy."""
        return len(self.turns)

    @property
    def num_sampled(self) -> int:
        """Tokens of the policy."""
        return sum(self.is_sampled)

    @property
    def versions(self) -> set[int]:
        """Of the weights that sampled its tokens."""
        sampled = zip(self.weight_versions, self.is_sampled, strict=True)
        return {version for version, is_sampled in sampled if is_sampled}

    @property
    def response(self) -> TaskResponse:
        """What verifiers read."""
        return TaskResponse(messages=tuple(self.messages), is_complete=not self.is_cut)


@dataclass
class _Playing:
    """A rollout that goes on, with what it needs for that."""

    rollout: Rollout
    tools: tuple[Tool, ...]
    environment: Environment
    session: Any
    seed: int
    next_prompt: Prompt | None


@dataclass(frozen=True)
class _Task:
    """A task, rendered once for all rollouts of its group."""

    row: Row
    group: int
    effort: str | None
    tools: tuple[Tool, ...]
    prompt: RenderedChat
    ids: list[int]


class RolloutDriver:
    """Plays tasks with one engine."""

    def __init__(
        self,
        llm: LLM,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        environments: Mapping[str, Environment],
        config: RolloutConfig,
        *,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        """`environments` are those that tasks are of, by name.

        `on_step` is called before steps of the engine; it may replace the engine's weights, or
        raise to end the play.
        """
        self._llm, self._tokenizer, self._template = llm, tokenizer, template
        self._environments, self._config = environments, config
        self._on_step = on_step
        self._errors = ErrorLog()

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
        """`group_size` rollouts of each task, in the order of the tasks.

        All turns of all rollouts are sampled together, as many at once as the engine holds. The
        same weights and `seed` give the same rollouts. A random share of the tasks,
        `effort_fraction`, asks for little effort. `places` are those of `rows` in a longer list of
        which other engines play the rest: groups, seeds and efforts are then those of the list.
        """
        places = range(len(rows)) if places is None else places
        chance = random.Random(f"effort {seed}")
        little = [chance.random() < effort_fraction for _ in range(max(places, default=-1) + 1)]
        wanted: dict[int, _Task] = {}
        for row, place in zip(rows, places, strict=True):
            task = self._task(row, place, self._config.effort if little[place] else None)
            wanted |= dict.fromkeys(range(place * group_size, (place + 1) * group_size), task)
        return asyncio.run(self._play(wanted, seed, on_ended))

    def _task(self, row: Row, group: int, effort: str | None) -> _Task:
        tools = tools_of(row)
        rendered = render_prompt(row, self._config, self._template, effort=effort)
        ids = rendered.tokens(self._tokenizer).ids
        return _Task(row, group, effort, tools, rendered, ids)

    async def _play(
        self, wanted: Mapping[int, _Task], seed: int, on_ended: OnEnded
    ) -> list[Rollout]:
        finished: dict[int, Rollout] = {}
        open_places = list(wanted)
        for attempt in range(1, self._config.max_attempts + 1):
            begun = await asyncio.gather(
                *(
                    self._begin(wanted[place], seed=_mixed(seed, place, attempt), attempt=attempt)
                    for place in open_places
                )
            )
            playing = dict(zip(open_places, begun, strict=True))
            before = len(wanted) - len(playing)
            await self._until_ended(
                list(playing.values()), lambda ended, more=before: on_ended(more + ended)
            )
            await self._verify(list(playing.values()))
            finished |= {place: each.rollout for place, each in playing.items()}
            for place in open_places:
                self._errors.log(finished[place].environment, failure_of(finished[place]))
            open_places = [place for place in open_places if failure_of(finished[place])]
            if not open_places:
                break
        on_ended(len(wanted))
        return [finished[place] for place in wanted]

    async def _begin(self, task: _Task, *, seed: int, attempt: int) -> _Playing:
        environment = self._environments[environment_of(task.row)]
        rollout = Rollout(
            row=task.row,
            group=task.group,
            ids=list(task.ids),
            is_sampled=[False] * len(task.ids),
            logprobs=[0.0] * len(task.ids),
            weight_versions=[0] * len(task.ids),
            attempts=attempt,
            effort=task.effort,
        )
        playing = _Playing(rollout, task.tools, environment, None, seed, None)
        try:
            playing.session = await environment.seed_session(task.row)
        except Exception as error:  # noqa: BLE001 - it may be anybody's code, as below
            failure = failure_of_error(error, environment, "seed_session")
            rollout.verification = Verification(failure=failure)
            return playing
        playing.next_prompt = self._prompt(playing, task.prompt)
        return playing

    def _prompt(self, playing: _Playing, rendered: RenderedChat) -> Prompt | None:
        """What the next turn continues; None where it would leave no room."""
        rollout = playing.rollout
        if len(rollout.ids) >= self._config.max_context:
            rollout.is_cut = True
            return None
        return Prompt(
            ids=tuple(rollout.ids),
            is_chat=True,
            is_reasoning_open=rendered.is_reasoning_open,
            tools=playing.tools,
        )

    async def _until_ended(self, playing: Sequence[_Playing], on_ended: OnEnded) -> None:
        """Sample turn after turn; each goes on as soon as its environment has answered."""
        with self._llm.requests() as requests:
            asked: list[Sequence[_Playing]] = []
            answering: dict[asyncio.Task[None], _Playing] = {}

            def ask(alike: Sequence[_Playing]) -> None:
                prompt = cast(Prompt, alike[0].next_prompt)
                has_turns = alike[0].environment.max_turns > 1
                params = self._params(alike[0], n=len(alike))
                requests.add(prompt, params, may_be_continued=has_turns)
                asked.append(alike)

            begun = [each for each in playing if each.next_prompt is not None]
            ended = len(playing) - len(begun)
            for alike in _with_equal_prompts(begun):
                ask(alike)
            try:
                while requests.has_work or answering:
                    if self._on_step is not None:
                        self._on_step()
                    if requests.has_work:
                        for place, answer in requests.step():
                            each = asked[place][answer.index]
                            answering[asyncio.create_task(self._take_turn(each, answer))] = each
                        await asyncio.sleep(0)  # environments in this process answer at once
                    else:
                        await asyncio.wait(answering, return_when=asyncio.FIRST_COMPLETED)
                    for task in [task for task in answering if task.done()]:
                        task.result()
                        each = answering.pop(task)
                        if each.next_prompt is not None:
                            ask([each])
                        else:
                            on_ended(ended := ended + 1)
            finally:
                for task in answering:
                    task.cancel()

    def _params(self, playing: _Playing, *, n: int) -> SamplingParams:
        config = self._config
        room = config.max_context - len(playing.rollout.ids)
        return SamplingParams(
            n=n,
            max_tokens=min(config.max_tokens, room),
            temperature=config.temperature,
            top_p=1.0,
            top_k=0,
            seed=_mixed(playing.seed, playing.rollout.num_turns),
            logprobs=0,
            reasoning_budget=config.reasoning_budget,
        )

    async def _take_turn(self, playing: _Playing, output: CompletionOutput) -> None:
        rollout = playing.rollout
        playing.next_prompt = None
        if output.failure is not None or output.error is not None:
            rollout.verification = Verification.failed(
                FailureKind.GENERATION, output.error or str(output.failure)
            )
            return
        turn = turn_of(output)
        rollout.turns.append(self._sampled_turn(playing, turn, output))
        _append_sampled(rollout, output)
        rollout.messages.append(turn)
        if output.finish_reason == "length":
            rollout.is_cut = True
            return
        try:
            said = await self._answers(playing, turn)
        except Exception as error:  # noqa: BLE001
            method = "call_tool" if turn.tool_calls else "step"
            failure = failure_of_error(error, playing.environment, method)
            rollout.verification = Verification(failure=failure)
            return
        if not said:
            return
        rollout.messages += said
        if rollout.num_turns >= playing.environment.max_turns:
            rollout.is_cut = True
            return
        # From the end of the policy's turn to the beginning of its next one.
        rendered = self._template.continuation(
            said,
            self._tokenizer,
            after_token=rollout.ids[-1],
            enable_thinking=self._config.enable_thinking,
        )
        ids = rendered.tokens(self._tokenizer).ids
        rollout.ids += ids
        rollout.is_sampled += [False] * len(ids)
        rollout.logprobs += [0.0] * len(ids)
        rollout.weight_versions += [0] * len(ids)
        playing.next_prompt = self._prompt(playing, rendered)

    def _sampled_turn(
        self, playing: _Playing, turn: AssistantMessage, output: CompletionOutput
    ) -> SampledTurn:
        start, ids = len(playing.rollout.ids), output.token_ids
        opened = ids.count(self._tokenizer.think_start_id)
        closed = ids.count(self._tokenizer.think_end_id)
        return SampledTurn(
            start=start,
            end=start + len(ids),
            has_invalid_call=any(not call.is_complete for call in output.tool_calls)
            or any(
                call_problem(playing.tools, call.name, call.arguments) for call in turn.tool_calls
            ),
            is_malformed=(opened, closed) != (0, int(self._config.enable_thinking)),
        )

    async def _answers(self, playing: _Playing, turn: AssistantMessage) -> list[Message]:
        """What tools or the user say to a turn; nothing where the rollout has ended."""
        environment, session = playing.environment, playing.session
        if turn.tool_calls:
            return [
                ToolMessage(
                    content=_text(await environment.call_tool(session, call.name, call.arguments)),
                    tool_call_id=call.id,
                )
                for call in turn.tool_calls
            ]
        said = await environment.step(session, turn)
        return [] if said is None else [UserMessage(content=_text(said))]

    async def _verify(self, playing: Sequence[_Playing]) -> None:
        """Judge those that nothing has failed for, group by group."""
        groups: dict[int, list[_Playing]] = {}
        for each in playing:
            if each.rollout.verification is None:
                groups.setdefault(each.rollout.group, []).append(each)
        await asyncio.gather(*(self._verify_group(group) for group in groups.values()))

    async def _verify_group(self, group: Sequence[_Playing]) -> None:
        environment, row = group[0].environment, group[0].rollout.row
        responses = [each.rollout.response for each in group]
        sessions = [each.session for each in group]
        try:
            found = list(await environment.verify_group(row, responses, sessions))
            if [type(each) for each in found] != [Verification] * len(group):
                raise TypeError(f"it returned {found!r:.80}, not {len(group)} verifications")
        except Exception as error:  # noqa: BLE001
            failure = failure_of_error(error, environment, "verify_group")
            found = [Verification(failure=failure)] * len(group)
        for each, verification in zip(group, found, strict=True):
            each.rollout.verification = verification


def _text(said: Any) -> str:
    if not isinstance(said, str):
        raise TypeError(f"it returned {type(said).__name__}, not a text")
    return said


def _with_equal_prompts(playing: Sequence[_Playing]) -> list[list[_Playing]]:
    """Those of a group that have said nothing yet, together: the engine reads their prompt once."""
    alike: dict[tuple[int, int], list[_Playing]] = {}
    for each in playing:
        alone = id(each) if each.rollout.num_turns else 0
        alike.setdefault((each.rollout.group, alone), []).append(each)
    return list(alike.values())


def _append_sampled(rollout: Rollout, output: CompletionOutput) -> None:
    rollout.ids += output.token_ids
    rollout.is_sampled += [True] * len(output.token_ids)
    rollout.logprobs += [entry.logprob for entry in output.logprobs]
    rollout.weight_versions += output.weight_versions
    rollout.continues_old_states |= output.continues_old_states
    rollout.routes = output.routed_experts  # of the whole sequence, earlier turns too


def failure_of(rollout: Rollout) -> Failure | None:
    """Why a rollout has no reward."""
    return None if rollout.verification is None else rollout.verification.failure


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 0x632BE59BD9B4E019) % 2**63
    return mixed
