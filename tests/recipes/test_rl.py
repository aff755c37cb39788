"""Whole reinforcement learning runs: rewards that grow, resuming, and what is refused."""

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemotron3 import LLM
from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.cli.rl import failure_lines
from nemotron3.environments import load_environment
from nemotron3.errors import ConfigError, DataError
from nemotron3.models.lora import LoRAConfig, merge_adapter, read_adapter
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig
from nemotron3.recipes import run_rl
from nemotron3.recipes.rl_summary import rl_report
from nemotron3.recipes.run_rl import rl
from nemotron3.rl.advantages import AdvantageConfig
from nemotron3.rl.curriculum import CurriculumConfig
from nemotron3.rl.data_parallel import EnginesConfig
from nemotron3.rl.generator import AsyncConfig
from nemotron3.rl.policy_objective import PolicyLossConfig
from nemotron3.rl.records import AFTER_TRAINING
from nemotron3.rl.rollouts import RolloutConfig, RolloutDriver
from nemotron3.rl.sampling_plan import EnvironmentConfig
from nemotron3.text import CHAT_STYLES, ChatTemplate, Tokenizer
from tests.recipes.small_rl import LETTER, metrics_of, small
from tests.rl.playground import save_policy
from tests.small_run import killed_after
from tests.tiny import randomized


def test_rewards_grow(policy, letter, tmp_path):
    run = small(policy, letter, steps=30, prompts=6, group_size=8, final_held_out_tasks=40)
    summary = rl(run, runs=tmp_path / "runs")
    folder = tmp_path / "runs" / "small"
    assert summary.reward["letter"] > summary.reward_before["letter"] + 0.2
    logged = metrics_of(folder)
    assert max(m["policy/logprob_error"] for m in logged.values()) < 1e-5
    assert min(m["policy/kept"] for m in logged.values()) > 0.999
    result = LanguageModel.from_pretrained(folder / "model")
    routers = [name for name, _ in result.named_parameters() if name.endswith("gate.weight")]
    before = LanguageModel.from_pretrained(policy).state_dict()
    assert routers
    assert all((result.state_dict()[name] == before[name]).all() for name in routers)
    kept = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    ends = ["held-out tasks before training", "held-out tasks after training"]
    moments = [ends[0], "step 0", "step 10", "step 20", ends[1]]
    assert list(dict.fromkeys(record["when"] for record in kept)) == moments
    assert all(moment in (folder / "rollouts.html").read_text() for moment in moments)
    assert rl(run, runs=tmp_path / "runs") == summary


def test_an_adapter_learns_and_the_engine_follows_it(policy, letter, tmp_path):
    """Every update's rollouts are sampled by the adapter of that update, to rounding."""
    run = small(
        policy,
        letter,
        steps=12,
        prompts=4,
        group_size=8,
        final_held_out_tasks=30,
        lora=LoRAConfig(rank=8, alpha=16.0, targets=("all-linear", "out_proj", "lm_head")),
        training={"bias_update_rate": 0.0, "checkpoint_every_steps": 6},
        loss=PolicyLossConfig(kl=1e-4),
    )
    summary = rl(run, runs=tmp_path / "runs")
    folder = tmp_path / "runs" / "small"
    assert summary.reward["letter"] > summary.reward_before["letter"] + 0.1
    logged = metrics_of(folder)
    assert len(logged) == 12
    assert max(m["policy/logprob_error"] for m in logged.values()) < 1e-5
    base, result = (LanguageModel.from_pretrained(path) for path in (policy, folder / "model"))
    merge_adapter(base, read_adapter(folder / "adapter", base))
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, result.state_dict()[name]), name
    saved = CheckpointStore(folder / "checkpoints").load().tensors
    assert all(name.endswith((".A", ".B")) for name in saved)


@pytest.mark.parametrize(
    "activations", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_an_adapter_that_was_killed_goes_on_to_the_same_losses(
    policy, letter, tmp_path, activations
):
    lora = LoRAConfig(rank=2, targets=("in_proj", "experts.up_proj"))
    precision = PrecisionConfig(activations=activations)
    training = {"bias_update_rate": 0.0, "checkpoint_every_steps": 1, "precision": precision}
    loss = PolicyLossConfig(kl=1e-4)
    run = small(policy, letter, steps=3, lora=lora, training=training, loss=loss)
    whole = rl(run, runs=tmp_path / "whole")
    with killed_after(1):
        rl(run, runs=tmp_path / "cut")
    cut = rl(run, runs=tmp_path / "cut")
    assert replace(cut, seconds=0.0) == replace(whole, seconds=0.0)
    for part in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        one, other = (tmp_path / name / "small" / part for name in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()
    # Engine and trainer have the same weights, and differ by the rounding of their activations.
    error = {"float32": 1e-5, "bfloat16": 1e-2}[activations]
    logged = metrics_of(tmp_path / "cut" / "small")
    assert [m["train/loss"] for m in logged.values()] == [
        m["train/loss"] for m in metrics_of(tmp_path / "whole" / "small").values()
    ]
    assert max(m["policy/logprob_error"] for m in logged.values()) < error
    result = LanguageModel.from_pretrained(tmp_path / "cut/small/model")
    assert result.output_weight.dtype == precision.dtype


def test_rollouts_with_drafts_are_those_without(policy, letter, tmp_path):
    """Their log-probabilities are those of training too."""
    records = {}
    for drafts in (0, 3):
        rl(small(policy, letter, max_draft_tokens=drafts), runs=tmp_path / str(drafts))
        folder = tmp_path / str(drafts) / "small"
        logged = metrics_of(folder)
        assert max(m["policy/logprob_error"] for m in logged.values()) < 1e-5
        lines = (folder / "rollouts.jsonl").read_text().splitlines()
        records[drafts] = [json.loads(line) for line in lines]
    first = [
        [r["messages"] for r in found if r["when"] != AFTER_TRAINING] for found in records.values()
    ]
    assert first[0] == first[1]


def test_drafts_of_a_model_without_mtp_are_refused(letter, tmp_path):
    plain = save_policy(tmp_path / "plain", pattern="ME*-E")
    run = small(plain, letter, max_draft_tokens=2)
    with pytest.raises(ConfigError, match=r"max_draft_tokens is 2, but .*plain has no multi-token"):
        rl(run, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="max_draft_tokens is -1"):
        replace(run, max_draft_tokens=-1)


def test_an_engine_of_a_run_drafts_as_many_as_it_is_told(policy, letter):
    config = small(policy, letter, max_draft_tokens=2).engine_config()
    assert (config.max_draft_tokens, config.adapts_drafts) == (2, False)
    model = randomized(LanguageModel.from_pretrained(policy))
    llm = LLM(model, tokenizer=Tokenizer.from_directory(policy), config=config)
    environment = load_environment(letter)
    driver = RolloutDriver(
        llm,
        Tokenizer.from_directory(policy),
        ChatTemplate(CHAT_STYLES["nano"]),
        {environment.name: environment},
        RolloutConfig(max_tokens=12, max_context=96),
    )
    driver.play([environment.task(0)], group_size=4)
    assert llm.stats().drafted_tokens > 0


def test_many_environments_share_every_batch(policy, letter, tmp_path):
    rollouts = RolloutConfig(max_tokens=12, max_context=256, enable_thinking=False)
    run = small(policy, letter, "math", "multiple_choice", prompts=6, rollouts=rollouts)
    summary = rl(run, runs=tmp_path / "runs")
    assert set(summary.reward) == {"all", "letter", "math", "multiple_choice"}
    for metrics in metrics_of(tmp_path / "runs/small").values():
        for name in ("letter", "math", "multiple_choice"):
            assert metrics[f"rollouts/played/{name}"] >= 2 * 4


def test_a_run_that_was_killed_goes_on_to_the_same_losses(policy, letter, tmp_path):
    run = small(policy, letter, steps=4, training={"checkpoint_every_steps": 1})
    whole = rl(run, runs=tmp_path / "whole")
    with killed_after(2):
        rl(run, runs=tmp_path / "cut")
    cut = rl(run, runs=tmp_path / "cut")
    assert replace(cut, seconds=0.0) == replace(whole, seconds=0.0)
    ours, theirs = (metrics_of(tmp_path / name / "small") for name in ("cut", "whole"))
    names = ("train/loss", "reward/mean", "optim/grad_norm", "policy/entropy")
    for step, metrics in theirs.items():
        for name in names:
            assert ours[step][name] == metrics[name], (step, name)


def test_a_pull_to_the_reference_is_logged_and_holds_the_policy(policy, letter, tmp_path):
    run = small(policy, letter, steps=3, loss=PolicyLossConfig(kl=0.5))
    rl(run, runs=tmp_path / "runs")
    logged = metrics_of(tmp_path / "runs/small")
    assert logged[1]["policy/kl_reference"] == pytest.approx(0.0, abs=1e-6)
    assert logged[3]["policy/kl_reference"] > 0


def test_settings_that_cannot_be_are_refused(policy, letter):
    run = small(policy, letter)
    for changes, said in (
        ({"environments": ()}, "environments is empty"),
        ({"group_size": 1}, "group_size is 1"),
        ({"group_size": 3}, "training.batch_size is 8; it must be a multiple of group_size 3"),
        ({"max_rounds": 0}, "max_rounds is 0"),
        ({"rollouts": RolloutConfig(temperature=0)}, "rollouts.temperature is 0"),
        ({"rollouts": RolloutConfig(max_context=100_000)}, "rollouts.max_context is 100000"),
    ):
        with pytest.raises(ConfigError, match=said):
            replace(run, **changes)
    with pytest.raises(ConfigError, match="weight of environment math is 0"):
        EnvironmentConfig(name="math", weight=0)


def test_environments_that_are_not_there_or_twice_are_refused(policy, letter, tmp_path):
    with pytest.raises(ConfigError, match=r"no environment 'maths' .did you mean 'math'"):
        rl(small(policy, "maths"), runs=tmp_path / "runs")
    with pytest.raises(ConfigError, match="two named 'letter'"):
        rl(small(policy, letter, letter), runs=tmp_path / "runs")
    with pytest.raises(ConfigError, match="2 prompts and there are 3 environments"):
        rl(small(policy, letter, "math", "calculator"), runs=tmp_path / "runs")


def test_advantages_may_be_those_of_the_reports(policy, letter, tmp_path):
    run = small(policy, letter, advantages=AdvantageConfig(deviation="leave_one_out"))
    assert rl(run, runs=tmp_path / "runs").reward.keys() == {"all", "letter"}


@pytest.mark.parametrize("what", ["environment", "model"])
def test_a_run_does_not_go_on_with_other_inputs(policy, letter, tmp_path, monkeypatch, what):
    """Even before its first checkpoint: what was measured before training is of the old ones."""
    own = tmp_path / "base" / "model"
    shutil.copytree(policy, own)
    run = small(own, letter)
    with monkeypatch.context() as patch:
        patch.setattr(run_rl._Training, "fit", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rl(run, runs=tmp_path / "runs")
    file = Path(letter) if what == "environment" else own / "config.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ConfigError, match=rf"begun with other inputs \(edited: .*{file.name}"):
        rl(run, runs=tmp_path / "runs")


def test_an_update_without_a_reward_ends_the_run_and_says_why(policy, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(
        LETTER.replace(
            "return Verification(reward=", "return Verification.failed('tool_failed', 'down') or ("
        ).replace('max(len(said), 1), info={"answer": said})', "max(len(said), 1))")
    )
    with pytest.raises(
        DataError, match=r"no rollout of update 1 can be trained on .* failures: down"
    ):
        rl(small(policy, str(file)), runs=tmp_path / "runs")


def test_an_environment_that_raises_now_and_then_is_counted_and_shown(policy, tmp_path):
    file = tmp_path / "fragile.py"
    wrong = 'if len(said) % 3 == 0:\n            raise KeyError("colour")\n        '
    file.write_text(LETTER.replace("return Verification", wrong + "return Verification"))
    run = small(policy, str(file), prompts=4, log_rollouts_every_steps=99)
    summary = rl(run, runs=tmp_path / "runs")
    folder = tmp_path / "runs/small"
    (failures,) = summary.failures.values()
    assert failures.held_out > 0
    assert failures.training == sum(m["rollouts/failed"] for m in metrics_of(folder).values()) > 0
    said = f"environment letter: verify raised KeyError: 'colour' ({file}:17)"
    assert failures.example == said
    assert said in "\n".join(failure_lines(summary))
    assert html.escape(said) in (folder / "rollouts.html").read_text()
    report = rl_report(run, summary, torch.device("cpu"))
    assert said in str(report.tables["Rollouts without a reward, because something failed"])


@pytest.mark.parametrize("engine", ["turns", "thread", "processes"])
def test_an_environment_that_raises_everywhere_ends_the_run_and_says_where(
    policy, tmp_path, engine
):
    file = tmp_path / "broken.py"
    ahead = AsyncConfig(max_staleness=int(engine == "thread"))
    processes = EnginesConfig(num_processes=2 * (engine == "processes"))
    run = small(policy, str(file), asynchronous=ahead, engines=processes)
    where = "environment letter: verify raised KeyError: 'colour' \\({}:{}\\); all {} rollouts"
    if engine == "turns":  # seen before training
        file.write_text(
            LETTER.replace(
                "return Verification", 'raise KeyError("colour")\n        return Verification'
            )
        )
        with pytest.raises(DataError, match=where.format(file, 16, 6)):
            rl(run, runs=tmp_path / "at_once")
    of_training = 'if str(split_of(row)) == "train": raise KeyError("colour")\n        '
    source = LETTER.replace("return Verification", of_training + "return Verification")
    file.write_text("from nemotron3.environments import split_of\n" + source)
    with pytest.raises(DataError, match=where.format(file, 17, 16)):
        rl(run, runs=tmp_path / "in_training")


def test_a_vocabulary_without_the_tokens_of_chats_is_refused(policy, letter, tmp_path, monkeypatch):
    monkeypatch.setattr("nemotron3.text.Tokenizer.token_to_id", lambda *_: None)
    with pytest.raises(ConfigError, match=r"vocabulary lacks <\|im_start\|>"):
        rl(small(policy, letter), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_curriculum_measures_pass_rates_and_goes_on_with_them(policy, letter, tmp_path):
    curriculum = CurriculumConfig(pool=12, samples=3, profile_every_steps=2)
    run = small(
        policy, letter, steps=4, curriculum=curriculum, training={"checkpoint_every_steps": 1}
    )
    whole = rl(run, runs=tmp_path / "whole")
    rates = json.loads((tmp_path / "whole/small/pass_rates.json").read_text())
    assert rates.keys() == {"0", "2"}
    assert all(len(found["letter"]) == 12 for found in rates.values())
    assert rates["0"] != rates["2"]
    with killed_after(3):
        rl(run, runs=tmp_path / "parts")
    parts = rl(run, runs=tmp_path / "parts")
    assert parts.reward == whole.reward
    assert json.loads((tmp_path / "parts/small/pass_rates.json").read_text()) == rates


@pytest.mark.parametrize("cut", ["in a line", "after three lines"])
def test_a_run_that_was_killed_while_it_kept_rollouts_has_all_of_them(
    policy, letter, tmp_path, cut
):
    run = small(policy, letter, log_rollouts_every_steps=1, training={"checkpoint_every_steps": 1})
    rl(run, runs=tmp_path / "runs")
    folder = tmp_path / "runs" / "small"
    file, before = folder / "rollouts.jsonl", (folder / "before.json").read_bytes()
    whole = file.read_text()

    def cut_in(moment):
        lines = whole.splitlines(keepends=True)
        first = next(i for i, line in enumerate(lines) if json.loads(line)["when"] == moment)
        rest = lines[first + 3][: len(lines[first + 3]) // 2] if cut == "in a line" else ""
        file.write_text("".join(lines[: first + 3]) + rest)
        (folder / "summary.json").unlink()

    cut_in("held-out tasks after training")
    rl(run, runs=tmp_path / "runs")
    assert file.read_text() == whole

    cut_in("step 1")
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    rl(run, runs=tmp_path / "runs")
    assert file.read_text() == whole

    cut_in("held-out tasks before training")
    (folder / "before.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    rl(run, runs=tmp_path / "runs")
    assert file.read_text() == whole
    assert (folder / "before.json").read_bytes() == before


@pytest.mark.parametrize("where", ["held_out", "train"])
def test_prompts_that_fill_the_context_are_refused_before_anything_is_played(
    policy, tmp_path, where
):
    file = tmp_path / "long.py"
    file.write_text(
        LETTER
        + f"""
    def task(self, index, *, split="train", seed=0):
        row = super().task(index, split=split, seed=seed)
        if split == "{where}" and index == 3:
            text = row["responses_create_params"]["input"][0]["content"]
            row["responses_create_params"]["input"][0]["content"] = text + " and say" * 80
        return row

    def distinct_tasks(self, num_tasks, *, split="held_out", seed=0):
        return [self.task(index, split=split, seed=seed) for index in range(num_tasks)]
"""
    )
    run = small(policy, str(file), prompts=6)
    with pytest.raises(ConfigError, match=r"max_context is 96, which 1 of 12 .*, of letter, has"):
        rl(run, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
