"""The examples do what they say."""

import asyncio
import random
import re
import runpy
import sys
from pathlib import Path

import pytest

from nemotron3.environments import check_environment, load_environment
from nemotron3.inference.llm import LLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.recipes.load import load_recipe
from nemotron3.training.schedules import Constant
from tests.inference.texts import text_model, tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_an_example_fits_on_a_page(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < 100


@pytest.mark.parametrize("name", ["reasoner", "answer_many"])
def test_an_example_with_arguments_tells_them(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "folder of" in capsys.readouterr().out


def test_look_inside(capsys):
    runpy.run_path(str(EXAMPLES / "look_inside.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "changes nothing: True" in shown
    assert float(shown.rsplit(maxsplit=1)[1]) < 1e-4


def test_train_by_hand_learns():
    model, history = runpy.run_path(str(EXAMPLES / "train_by_hand.py"))["train"](steps=20)
    assert history[-1]["train/loss"] < 0.5 * history[0]["train/loss"]
    (output,) = LLM(model).generate([[100, 101, 102]], SamplingParams(max_tokens=3))
    assert output.outputs[0].token_ids


def test_own_recipe_keeps_what_a_merge_needs():
    run = load_recipe(str(EXAMPLES / "own_recipe.py"))
    assert isinstance(run.training.schedule, Constant)
    assert run.retention.keep_every_steps == run.training.checkpoint_every_steps
    assert run.training.steps % run.training.checkpoint_every_steps == 0


def test_answer_many_finds_what_it_has_read(tmp_path, capsys):
    text_model().save_pretrained(tmp_path)
    tokenizer().save(tmp_path)
    runpy.run_path(str(EXAMPLES / "answer_many.py"))["main"](str(tmp_path), max_tokens=12)
    shown = capsys.readouterr().out
    assert shown.count("drafts stood") == 8
    found, read = re.findall(r"second call: (\d+) of (\d+) prompt tokens", shown)[0]
    assert int(found) > int(read) // 2


def test_sums_are_right_and_some_are_held_out():
    sums = runpy.run_path(str(EXAMPLES / "sums.py"))
    draw = random.Random(0)
    kept = {tuple(sums["problem"](draw, held_out=True)) for _ in range(300)}
    assert not kept & {tuple(sums["problem"](draw)) for _ in range(3000)}
    for kind in dict.fromkeys(sums["KINDS"]):
        for _ in range(50):
            text = sums["conversation"](draw, kind).text
            question = re.search(r"user\n([\d+]+)", text)[1]
            if kind != "cut":
                for left, right in re.findall(r"([\d+]+)=(\d+)\n", text):
                    assert sum(map(int, left.split("+"))) == int(right)
            assert text.endswith(f"{sum(map(int, question.split('+')))}<|im_end|>\n")
            assert ("<think></think>" in text) == (kind == "direct")
            assert ("effort: low" in text) == (kind == "brief")


@pytest.mark.slow
def test_reasoner_trains_and_is_asked_in_every_way(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = runpy.run_path(str(EXAMPLES / "reasoner.py"))
    example["main"](tmp_path, conversations=300, steps=3)
    shown = capsys.readouterr().out
    asked = re.findall(r"\n(.+): [\d+]+ is \d+\n", shown)
    assert asked == ["thinking", "low effort", "at most 16 tokens of thinking", "no thinking"]
    assert shown.count("\nanswer") == len(asked)
    assert (tmp_path / "reasoner" / "model" / "chat_template.jinja").exists()


@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_own_environment_is_sound(difficulty):
    environment = load_environment(str(EXAMPLES / "own_environment.py"), difficulty=difficulty)
    assert len(environment.distinct_tasks(300)) == 300
    report = asyncio.run(check_environment(environment, num_tasks=100))
    assert report.demonstration_reward == 1
    assert report.num_turns <= environment.max_turns
    assert not any(report.hack_rewards.values())
    assert report.top_answer_share < 0.05
