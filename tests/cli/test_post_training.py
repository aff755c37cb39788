"""`nemotron3 env demonstrations`, `sft` and `rl`, as they are typed."""

import json

import pytest

from nemotron3.cli.main import main
from nemotron3.cli.tuning import weighted
from nemotron3.data.conversations import parse_conversation
from tests.rl.playground import save_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def chats(tmp_path, capsys):
    assert main(["env", "demonstrations", "letter_counting", "--num-tasks", "30"]) == 0
    file = tmp_path / "chats.jsonl"
    file.write_text(capsys.readouterr().out)
    return file


@pytest.mark.parametrize("name", ["calculator", "guess_number", "math"])
@pytest.mark.parametrize("with_tools", [False, True])
def test_demonstrations_are_conversations_that_can_be_trained_on(capsys, name, with_tools):
    options = ["--num-tasks", "3"] + (["--with-tools"] if with_tools else [])
    assert main(["env", "demonstrations", name, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        found = parse_conversation(line, place="here")
        assert bool(found.tools) == (with_tools and name == "calculator")


def test_a_model_is_tuned_on_ones_own_file_and_then_by_rewards(policy, chats, tmp_path, capsys):
    runs = ["--runs", str(tmp_path / "runs")]
    short = ["--epochs", "0.5", "--sampling.max-tokens", "4"]
    assert main(["sft", str(policy), "--data", str(chats), *runs, *short, "--name", "one"]) == 0
    said = capsys.readouterr().out
    assert "held-out loss" in said
    assert "try: nemotron3 chat" in said
    tuned = tmp_path / "runs" / "one" / "model"
    options = ["--steps", "1"]
    options += ["--training.batch-size", "16", "--rollouts.max-tokens", "4", "--name", "two"]
    options += ["--held-out-tasks", "2", "--final-held-out-tasks", "2"]
    assert main(["rl", str(tuned), "--environment", "letter_counting", *runs, *options]) == 0
    said = capsys.readouterr().out
    assert "letter_counting" in said
    assert (tmp_path / "runs" / "two" / "model" / "chat_template.jinja").exists()


def test_a_preview_colours_what_is_trained(policy, chats, capsys, tmp_path):
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["sft", str(policy), "--data", str(chats), "--preview", "1", *runs]) == 0
    said = capsys.readouterr().out
    assert "trained" in said
    assert "\033[32m" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sft"], "usage: nemotron3 sft MODEL"),
        (["rl"], "usage: nemotron3 rl MODEL"),
    ],
)
def test_without_a_model_there_is_help(arguments, said, capsys):
    assert main(arguments) == 0
    assert said in capsys.readouterr().out


def test_wrong_lines_say_what_to_do(policy, chats, tmp_path, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    for arguments, said in (
        (["sft", str(policy)], "say what it is trained on, as in: --data chats.jsonl"),
        (["sft", str(folder), "--data", str(chats)], "give a model directory"),
        (["sft", "--data", str(chats)], "no model; name it first"),
        (["sft", "tiny"], "a SFTRun is wanted here"),
        (["rl", str(policy)], "say what it learns, as in: --environment math"),
        (["rl", str(policy), "--environment", "math=much"], "did you mean 'math'"),
        (["rl", "tiny", "--steps", "3"], "--steps goes with a model directory"),
        (["sft", "tiny", "--epochs", "3"], "--epochs goes with a model directory"),
        (["sft", "--from", "run.json", "--data", str(chats)], "--data goes with a model"),
        (["rl", str(folder)], "give a model directory"),
        (["rl", "--environment", "math"], "no model; name it first"),
    ):
        assert main(arguments) == 2, arguments
        assert said in capsys.readouterr().err


def test_rows_are_json_lines(chats):
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    assert {message["role"] for row in rows for message in row["messages"]} == {"user", "assistant"}


def test_weights_of_environments_follow_their_names():
    assert weighted("math") == ("math", 1.0)
    assert weighted("math=2") == ("math", 2.0)
    address = "rows.jsonl@http://127.0.0.1:8001"
    assert weighted(f"{address}=0.5") == (address, 0.5)
    assert weighted(f"{address}?max_turns=8") == (f"{address}?max_turns=8", 1.0)
    assert weighted(f"{address}?agent=a&max_turns=8=3") == (f"{address}?agent=a&max_turns=8", 3.0)
