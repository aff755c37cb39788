"""Rollouts: token-in, token-out, the same log-probabilities in training, failures."""

import asyncio
from dataclasses import replace

import pytest
import torch

from nemotron3 import LLM, EngineConfig
from nemotron3.environments.calculator import Calculator
from nemotron3.errors import ConfigError
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.routes import RecordedRoutes
from nemotron3.ops.cross_entropy import token_logprobs
from nemotron3.ops.segments import Segments
from nemotron3.rl.advantages import AdvantageConfig
from nemotron3.rl.batches import policy_batches
from nemotron3.rl.groups import collect
from nemotron3.rl.policy_objective import PolicyLossConfig, PolicyObjective
from nemotron3.rl.rollouts import RolloutConfig, RolloutDriver, failure_of
from nemotron3.rl.sampling_plan import SamplingPlan, quotas
from nemotron3.text import CHAT_STYLES, ChatTemplate, Tokenizer
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep
from tests.rl.playground import Chatter, Failing, OtherParity, Parity, save_policy
from tests.tiny import randomized

TEMPLATE = ChatTemplate(CHAT_STYLES["nano"])


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = save_policy(tmp_path_factory.mktemp("policy"))
    return randomized(LanguageModel.from_pretrained(folder)), Tokenizer.from_directory(folder)


def driver_for(policy, *environments, engine=None, **config):
    model, tokenizer = policy
    limits = {"max_num_seqs": 5, "max_model_len": 256} | (engine or {})
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(**limits))
    settings = RolloutConfig(**({"max_tokens": 12, "max_context": 200} | config))
    named = {environment.name: environment for environment in environments}
    return RolloutDriver(llm, tokenizer, TEMPLATE, named, settings)


def tasks(environment, count):
    return [environment.task(index) for index in range(count)]


@torch.no_grad()
def training_logprobs(model, rollout):
    """Of every token but the first, by one forward pass."""
    ids = torch.tensor(rollout.ids)
    return model(
        ids[:-1],
        layout=SequenceLayout(Segments([len(ids) - 1])),
        head=lambda output: token_logprobs(output.hidden[0], output.output_weight, ids[1:]),
    )


@pytest.mark.parametrize("engine", [{}, {"max_draft_tokens": 0}, {"max_num_batched_tokens": 7}])
@pytest.mark.parametrize("budget", [None, 3])
def test_engine_and_training_give_every_sampled_token_the_same_log_probability(
    policy, engine, budget
):
    """Over turns, with drafts, prompts in chunks and forced ends of reasoning."""
    environments = (Parity(), Chatter())
    driver = driver_for(policy, *environments, engine=engine, reasoning_budget=budget)
    rows = [row for environment in environments for row in tasks(environment, 3)]
    rollouts = driver.play(rows, group_size=2, seed=1)
    assert len(rollouts) == 12
    assert any(rollout.num_turns > 1 for rollout in rollouts)
    for rollout in rollouts:
        scores = training_logprobs(policy[0], rollout)
        sampled = torch.tensor(rollout.is_sampled[1:])
        assert sampled.any()
        difference = scores - torch.tensor(rollout.logprobs[1:])
        assert difference[sampled].abs().max() < 1e-5


def test_turns_are_joined_by_ids_and_what_was_sampled_is_never_tokenized_again(policy):
    (rollout,) = driver_for(policy, Chatter(), max_tokens=6).play(tasks(Chatter(), 1), seed=4)
    tokenizer = policy[1]
    assert len(rollout.ids) == len(rollout.is_sampled) == len(rollout.logprobs)
    runs = []
    for token, is_sampled in zip(rollout.ids, rollout.is_sampled, strict=True):
        if not runs or runs[-1][0] != is_sampled:
            runs.append((is_sampled, []))
        runs[-1][1].append(token)
    said = [tokenizer.decode(ids) for is_sampled, ids in runs if not is_sampled]
    assert said[0].endswith("<|im_start|>assistant\n<think>\n")
    for turn, text in enumerate(said[1:], start=1):
        assert text.removeprefix("<|im_end|>") == (
            f"\n<|im_start|>user\nand {turn} <|im_end|><|im_end|>\n<|im_start|>assistant\n<think>\n"
        )
        # What a user writes is text: the end token that it spells is none.
        ids = [ids for is_sampled, ids in runs if not is_sampled][turn]
        assert ids.count(tokenizer.im_end_id) <= 2


def test_the_same_seed_gives_the_same_rollouts_and_group_members_differ(policy):
    rows = tasks(Parity(), 2)
    first, again = (driver_for(policy, Parity()).play(rows, group_size=3, seed=7) for _ in range(2))
    assert [rollout.ids for rollout in first] == [rollout.ids for rollout in again]
    other = driver_for(policy, Parity()).play(rows, group_size=3, seed=8)
    assert [rollout.ids for rollout in first] != [rollout.ids for rollout in other]
    assert len({tuple(rollout.ids) for rollout in first[:3]}) == 3
    assert [rollout.group for rollout in first] == [0, 0, 0, 1, 1, 1]


def test_how_many_run_at_once_changes_nothing(policy):
    rows = tasks(Parity(), 3)
    alone, together = (
        driver_for(policy, Parity(), engine={"max_num_seqs": n}).play(rows, group_size=2, seed=2)
        for n in (1, 6)
    )
    assert [rollout.ids for rollout in alone] == [rollout.ids for rollout in together]


def test_an_environment_that_is_slow_to_answer_holds_up_no_other_rollout(policy):
    is_ahead = asyncio.Event()

    class Late(Chatter):
        name = "late"

        async def step(self, session, turn):
            await asyncio.wait_for(is_ahead.wait(), timeout=60)
            return await super().step(session, turn)

    class Early(Chatter):
        async def step(self, session, turn):
            if len(session.turns) == 2:
                is_ahead.set()
            return await super().step(session, turn)

    driver = driver_for(policy, Late(), Early())
    ended = []
    late, early = driver.play(
        [*tasks(Late(), 1), *tasks(Early(), 1)], seed=1, on_ended=ended.append
    )
    assert ended == [1, 2, 2]
    assert (late.num_turns, early.num_turns) == (3, 3)
    assert (late.reward, early.reward) == (3.0, 3.0)


def test_states_are_cached_where_a_further_turn_may_continue_them(policy):
    driver = driver_for(policy, Parity(), Chatter())
    for environment, is_cached in ((Parity(), False), (Chatter(), True)):
        driver.play(tasks(environment, 2), group_size=2)
        assert bool(driver._llm.stats().prefix_bytes) == is_cached


def test_a_rollout_without_room_is_cut_and_its_answer_is_none(policy):
    for limits in ({"max_tokens": 2}, {"max_context": 60, "max_tokens": 60}):
        driver = driver_for(policy, Parity(), **limits)
        for rollout in driver.play(tasks(Parity(), 2), seed=0):
            if rollout.is_cut:
                assert rollout.response.answer == ""
            assert len(rollout.ids) <= limits.get("max_context", 200)


@pytest.mark.parametrize("where", ["seed_session", "verify"])
def test_failures_are_tried_again_and_then_counted_never_scored(policy, where):
    mended = Failing(where=where, times=1)
    ended = []
    (rollout,) = driver_for(policy, mended).play(tasks(mended, 1), on_ended=ended.append)
    assert ended[-1] == 1
    assert rollout.reward == 1.0
    assert rollout.attempts == 2
    broken = Failing(where=where, times=99)
    (rollout,) = driver_for(policy, broken, max_attempts=3).play(tasks(broken, 1))
    assert rollout.reward is None
    assert rollout.attempts == 3
    assert f"no {where} today" in failure_of(rollout).message


def test_tools_are_called_and_their_answers_read(policy, monkeypatch):
    """The policy's words are given, since it cannot call by itself."""
    calculator = Calculator()
    row = calculator.task(0)
    turns = calculator.solve(row)
    driver = driver_for(policy, calculator, max_context=2000, engine={"max_model_len": 2000})
    given = iter(turns)
    monkeypatch.setattr("nemotron3.rl.rollouts.turn_of", lambda _: next(given))
    (rollout,) = driver.play([row])
    if not rollout.is_cut:
        response = asyncio.run(calculator.demonstration(row))
        assert rollout.messages == list(response.messages)
        assert rollout.reward == 1.0


def plan_for(*environments, prompts=4, rounds=2):
    named = {environment.name: environment for environment in environments}
    weights = dict.fromkeys(named, 1.0)
    return SamplingPlan(named, weights, prompts=prompts, rounds=rounds, seed=0)


def test_groups_without_variance_are_refilled_and_advantages_sum_to_nothing(policy):
    environments = (Parity(), OtherParity())
    driver = driver_for(policy, *environments)
    plan = plan_for(*environments)
    rounds = []

    def play(rows, round_):
        rounds.append(len(rows))
        return driver.play(rows, group_size=4, seed=round_)

    found = collect(plan, play, 0, rounds=2, config=AdvantageConfig(clamp=None))
    assert rounds[0] == 4
    assert len(found.played) == 4 * sum(rounds)
    assert len(found.trained) == len(found.advantages)
    assert sum(found.advantages) == pytest.approx(0, abs=1e-6)
    metrics = found.metrics()
    assert metrics["rollouts/played"] == len(found.played)
    assert metrics["perf/rollouts_s"] > 0
    assert metrics["rollouts/trained/parity"] + metrics["rollouts/trained/odd"] == len(
        found.trained
    )
    batches = policy_batches(found.trained, found.advantages, max_tokens=300)
    assert sum(batch.mask.sum().item() for batch in batches) == sum(
        rollout.num_sampled for rollout in found.trained
    )
    assert all(batch.segments.total <= 300 for batch in batches)


def test_failed_rollouts_are_in_no_baseline(policy):
    environment = Failing(where="verify", times=99)
    driver = driver_for(policy, environment, max_attempts=1)
    plan = plan_for(environment, prompts=1, rounds=1)
    found = collect(
        plan,
        lambda rows, _: driver.play(rows, group_size=3),
        0,
        rounds=1,
        config=AdvantageConfig(),
    )
    assert found.trained == []
    assert found.metrics()["rollouts/failed/failing"] == 3


def test_every_step_has_other_tasks_and_a_round_does_not_repeat_one():
    plan = plan_for(Parity(), OtherParity(), prompts=6, rounds=3)
    seen = []
    for step in range(4):
        for round_ in range(3):
            seen += plan.tasks(step, round_=round_, missing=plan.quotas)
    prompts = [(row["agent_ref"]["name"], row["number"]) for row in seen]
    assert len(set(prompts)) == len(prompts) == 4 * 3 * 6


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ({"a": 1, "b": 1}, 5, {"a": 3, "b": 2}),
        ({"a": 1, "b": 3}, 8, {"a": 3, "b": 5}),
        ({"a": 1, "b": 1000}, 4, {"a": 1, "b": 3}),
        ({"a": 2.0}, 3, {"a": 3}),
    ],
)
def test_quotas_are_in_proportion_and_nobody_is_left_out(weights, total, expected):
    assert quotas(weights, total) == expected


def test_fewer_prompts_than_environments_is_an_error():
    with pytest.raises(ConfigError, match="1 prompts and there are 2 environments"):
        quotas({"a": 1, "b": 1}, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("max_context", 0), ("max_attempts", 0), ("temperature", -1)],
)
def test_settings_are_checked(name, value):
    with pytest.raises(ConfigError, match=f"rollouts.{name} is {value}"):
        RolloutConfig(**{name: value})


@pytest.mark.parametrize("engine", [{}, {"max_draft_tokens": 0}, {"max_num_batched_tokens": 7}])
def test_training_chooses_the_experts_that_the_engine_chose(policy, engine):
    """Over turns and groups, every token but the last has the experts of every mixture."""
    driver = driver_for(policy, Chatter(), engine=engine | {"return_routed_experts": True})
    rollouts = driver.play(tasks(Chatter(), 2), group_size=2, seed=3)
    assert any(rollout.num_turns > 1 for rollout in rollouts)
    (batch,) = policy_batches(rollouts, [1.0] * len(rollouts), max_tokens=10**4)
    layout = SequenceLayout(batch.segments)
    with torch.no_grad():
        own = policy[0](batch.tokens, layout=layout, head=lambda output: output.routes)
    assert len(own.backbone) == len(batch.routes.backbone) == 2
    for mine, engines in zip(own.backbone, batch.routes.backbone, strict=True):
        assert (mine.sort().values == engines.sort().values).all()


def test_replayed_experts_are_those_that_training_uses(policy):
    """Experts that no router would choose: the loss of a batch with them is another."""
    rollouts = driver_for(policy, Parity(), engine={"return_routed_experts": True}).play(
        tasks(Parity(), 2), group_size=2
    )
    experts = policy[0].config.moe.n_routed_experts
    (batch,) = policy_batches(rollouts, [1.0] * 4, max_tokens=10**4)
    moved = replace(
        batch, routes=RecordedRoutes(backbone=[(r + 1) % experts for r in batch.routes.backbone])
    )
    found = []
    for each in (batch, moved):
        step = TrainingStep(
            policy[0],
            build_optimizer(policy[0], AdamWConfig(lr=0.1, weight_decay=0.0)),
            PolicyObjective(PolicyLossConfig()),
            clip_grad_norm=None,
        )
        found.append(step([each], learning_rate=0.0)["policy/logprob_error"])
    assert found[0] < 1e-5
    assert found[1] > 1e-3


def test_an_engine_that_records_no_experts_leaves_the_choice_to_training(policy):
    rollouts = driver_for(policy, Parity()).play(tasks(Parity(), 1))
    (batch,) = policy_batches(rollouts, [1.0], max_tokens=10**4)
    assert batch.routes is None
