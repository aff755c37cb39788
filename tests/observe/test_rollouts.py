"""The page that shows rollouts."""

import json

import pytest

from nemotron3.observe.rollouts import rollouts_page, write_rollouts_page

PROMPT = {"role": "user", "content": "2+2?"}


def record(**changes):
    turn = {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "two and two",
        "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}],
    }
    return {
        "when": "step 0",
        "environment": "math",
        "prompt": "2+2?",
        "messages": [PROMPT, turn],
        "reward": 1.0,
        "components": {"format": 1.0},
        "shaping": None,
        "advantage": 0.5,
        "penalties": [],
        "failure": None,
        "tokens": 7,
        "is_cut": False,
    } | changes


def test_a_rollout_shows_what_was_done_and_why_it_was_rewarded():
    page = rollouts_page([record(), record(reward=0.0, advantage=-0.5)], title="mine")
    for text in ("2+2?", "two and two", "add({&quot;a&quot;: 2})", "format 1", "advantage +0.50"):
        assert text in page
    assert page.count("2+2?") == 1  # the prompt of a group stands once
    assert page.index("advantage +0.50") < page.index("advantage -0.50")  # the best first


def test_what_shaping_did_stands_beside_the_reward_and_at_the_turn():
    messages = [
        PROMPT,
        {"role": "assistant", "content": "first"},
        {"role": "tool", "content": "error"},
        {"role": "assistant", "content": "second"},
    ]
    penalty = {"turn": 0, "advantage": -5.0, "why": "a call that no tool takes"}
    page = rollouts_page(
        [record(messages=messages, penalties=[penalty], shaping="reward 0: no final answer")],
        title="mine",
    )
    told = page.index("this turn: advantage -5, a call that no tool takes")
    assert page.index("first") < told < page.index("error") < page.index("second")
    assert "shaped: reward 0: no final answer" in page
    assert 'class="penalty"' not in rollouts_page([record()], title="mine")


def test_failures_have_no_reward():
    page = rollouts_page([record(reward=None, failure="the judge is away")], title="mine")
    assert "the judge is away" in page
    assert "no reward of 1 rollouts" in page


def test_failures_stand_at_the_head_even_where_their_prompts_have_no_place():
    many = [record(prompt=f"{n}", reward=float(n % 2)) for n in range(40)] * 2
    failed = [record(prompt="last", reward=None, failure="KeyError: <x>") for _ in range(2)]
    page = rollouts_page([*many, *failed], title="mine")
    assert "of 82 rollouts, 2 failed" in page
    assert "<b>2 failed:</b> KeyError: &lt;x&gt;" in page
    assert "failed" not in rollouts_page(many, title="mine").split("</style>")[1]


@pytest.mark.parametrize("field", ["content", "reasoning_content"])
def test_what_a_model_writes_is_text(field):
    hostile = {"role": "assistant", "content": "", field: "<script>alert(1)</script>"}
    page = rollouts_page([record(messages=[PROMPT, hostile])], title="<b>")
    assert "<script>" not in page
    assert "<b>" not in page.split("<style>")[0]


def test_long_runs_show_moments_at_equal_distances_with_both_ends(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    lines = [json.dumps(record(when=f"step {step}")) for step in range(100)]
    file.write_text("\n".join(lines) + "\n")
    page = write_rollouts_page(file, title="long").read_text()
    assert page.count("<details") == 12
    assert "step 0 " in page
    assert "step 99 " in page


def test_without_records_there_is_no_page(tmp_path):
    assert write_rollouts_page(tmp_path / "rollouts.jsonl", title="none") is None
    (tmp_path / "rollouts.jsonl").touch()
    assert write_rollouts_page(tmp_path / "rollouts.jsonl", title="none") is None
    assert not (tmp_path / "rollouts.html").exists()
