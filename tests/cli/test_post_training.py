"""`nemotron3 env demonstrations`, `sft` and `rl`, as they are typed."""

import io
import json
import shutil
from pathlib import Path

import pytest

from nemotron3.cli.main import main
from nemotron3.cli.tuning import weighted
from nemotron3.config import read_run
from nemotron3.data.conversations import parse_conversation
from nemotron3.models.lora import LoRAConfig
from nemotron3.recipes.own_conversations import own_conversations
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.sft import SFTRun
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


def test_an_adapter_is_trained_merged_and_used(policy, chats, tmp_path, capsys, monkeypatch):
    runs = ["--runs", str(tmp_path / "runs")]
    short = ["--epochs", "0.5", "--sampling.max-tokens", "4", "--name", "one"]
    lora = ["--lora.rank", "2", "--lora.alpha", "4", "--lora.targets", "in_proj", "experts.up_proj"]
    assert main(["sft", str(policy), "--data", str(chats), *runs, *short, *lora]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "runs" / "one"
    for expected in ("Trained are", "routed experts", "frozen of", f"adapter  {folder}/adapter"):
        assert expected in said
    run = read_run(folder, SFTRun)
    assert run.lora == LoRAConfig(rank=2, alpha=4.0, targets=("in_proj", "experts.up_proj"))
    full = own_conversations(policy, run.data)
    assert run.training.optimizer.lr == 10 * full.training.optimizer.lr

    out = tmp_path / "merged"
    assert main(["merge-adapter", str(policy), str(folder / "adapter"), str(out)]) == 0
    assert f"products of {policy}: {out}" in capsys.readouterr().out
    greedy = ["user", "--max-tokens", "8", "--temperature", "0", "--device", "cpu"]
    texts = []
    for model in ([str(out)], [str(policy), "--lora", str(folder / "adapter")]):
        assert main(["generate", model[0], *greedy, *model[1:]]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("say up\n"))
    talk = ["--lora", str(folder / "adapter"), "--max-tokens", "4", "--max-model-len", "128"]
    assert main(["chat", str(policy), "--no-tools", *talk]) == 0
    assert "4 tokens" in capsys.readouterr().out


def test_an_adapter_is_trained_by_rewards(policy, tmp_path, capsys):
    options = ["--steps", "1", "--runs", str(tmp_path / "runs"), "--name", "two"]
    options += ["--training.batch-size", "16", "--rollouts.max-tokens", "4", "--lora.rank", "2"]
    options += ["--held-out-tasks", "2", "--final-held-out-tasks", "2"]
    assert main(["rl", str(policy), "--environment", "letter_counting", *options]) == 0
    said = capsys.readouterr().out
    assert "Trained are" in said
    assert (tmp_path / "runs/two/adapter/adapter_config.json").exists()


TRL_PAGE = Path(__file__).parents[2] / "docs" / "environments.md"
OWN = {
    "environment": (Path(__file__).parents[2] / "examples" / "own_environment.py").read_text(),
    "trl": TRL_PAGE.read_text("utf-8").partition("## TRL")[2].partition("```python\n")[2]
    .partition("```")[0],
}  # fmt: skip
SHORT = ["--steps", "1", "--training.batch-size", "16", "--rollouts.max-tokens", "4"]
SHORT += ["--held-out-tasks", "2", "--final-held-out-tasks", "2", "--rollouts.max-context", "2000"]
SHORT += ["--training.seq-len", "2000"]


@pytest.mark.parametrize("kind", OWN)
def test_an_environments_file_is_trained_on(policy, tmp_path, capsys, monkeypatch, kind):
    """From the model of tiny-sft, or from another, alone or with other environments."""
    monkeypatch.chdir(tmp_path)
    Path("my_env.py").write_text(OWN[kind])
    assert main(["rl", "my_env.py", *SHORT]) == 2
    assert "nemotron3 sft tiny-sft` makes it" in capsys.readouterr().err
    shutil.copytree(policy, "runs/tiny-sft/model")
    assert main(["rl", "my_env.py", *SHORT]) == 0
    name = {"environment": "word_rules", "trl": "counter"}[kind]
    assert name in capsys.readouterr().out
    run = read_run(Path("runs/tiny-sft-my_env"), RLRun)
    assert (run.model, run.training.steps) == ("runs/tiny-sft/model", 1)
    assert [each.name for each in run.environments] == ["my_env.py"]
    more = ["--environment", "math=2", "--model", str(policy), "--name", "other"]
    assert (
        main(["rl", "my_env.py", *SHORT[:2], "--training.batch-size", "32", *SHORT[4:], *more]) == 0
    )
    assert name in (said := capsys.readouterr().out)
    assert "math" in said
    run = read_run(Path("runs/other"), RLRun)
    assert run.model == str(policy)
    assert [(each.name, each.weight) for each in run.environments] == [
        ("my_env.py", 1),
        ("math", 2),
    ]


def test_a_file_with_neither_recipe_nor_environment_is_told_both_ways(policy, tmp_path, capsys):
    file = tmp_path / "my.py"
    file.write_text("class Counter:\n    def reset(self): ...\n")
    assert main(["rl", str(file)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    for expected in ("no function `recipe` that returns a run of class RLRun", "Environment"):
        assert expected in said
    assert "subclass of ToolClassEnvironment" in said
    file.write_text(f"{OWN['trl']}\ndef recipe():\n    return 3\n")  # that of the file is meant
    assert main(["rl", str(file), "--steps", "1"]) == 2
    assert "--steps goes with a model directory" in " ".join(capsys.readouterr().err.split())
    file.write_text(OWN["trl"])
    assert main(["rl", str(file), "--model", str(policy), "--difficulty", "0.5", *SHORT]) == 2
    assert "as difficult as they are" in " ".join(capsys.readouterr().err.split())


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


def test_wrong_lines_say_what_to_do(policy, chats, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a run that gets as far as a folder leaves it
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
        (["sft", str(policy), "--data", str(chats), "--lora.targets", "inproj"], "are in_proj"),
        (
            ["sft", str(policy), "--data", f"{chats}=inf"],
            f"weight of --data {chats} is inf; it mus",
        ),
        (
            ["sft", str(policy), "--data", f"{chats}=nan"],
            f"weight of --data {chats} is nan; it mus",
        ),
        (["sft", str(policy), "--data", f"{chats}=0"], f"the weight of --data {chats} is 0.0"),
        (["sft", str(policy), "--data", "=2"], "--data is empty"),
        (["sft", str(policy), "--data", str(chats), "--data", str(chats)], "is given twice; give"),
        *(
            (["sft", str(policy), "--data", str(chats), f"--epochs={n}"], f"--epochs is {n}; it mu")
            for n in ("nan", "inf", "0.0", "-1.0")
        ),
        (
            ["sft", str(policy), "--data", str(chats), "--max-bad-fraction", "nan"],
            "--max-bad-fraction is nan; it must",
        ),
        (["sft", "tiny", "--max-bad-fraction", "0.1"], "--max-bad-fraction goes with a model"),
        *(
            (["rl", str(policy), "--environment", f"math={n}"], f"environment math is {n}; it must")
            for n in ("nan", "inf", "0.0", "-1.0")
        ),
        (["rl", str(policy), "--environment", "math", "--difficulty", "inf"], "difficulty is inf"),
        (["eval", str(policy), "--environment", "math=inf"], "difficulty is inf"),
        (["eval", str(policy), "--environment", "math=nan"], "difficulty is nan"),
        (["rl", str(policy), "--environment", "math", "--steps", "0"], "--steps is 0; it"),
        (["merge-adapter", str(policy), str(folder), str(tmp_path / "o")], "adapter_config.json"),
        (["generate", str(policy), "x", "--lora", str(folder)], "adapter_config.json"),
        (["serve", str(policy), "--lora", "adapter"], "give a name and the adapter's directory"),
        (["serve", str(policy), "--lora", "a=b", "--lora", "a=c"], "two adapters named 'a'"),
        (["serve", str(policy), "--lora", "base=b", "--served-model-name", "base"], "is the model"),
    ):
        assert main(arguments) == 2, arguments
        assert said in capsys.readouterr().err


def test_files_of_one_name_and_unusable_rows_are_trained_on(policy, chats, tmp_path, capsys):
    """Files are told apart by their folders; a share of bad rows may be left out."""
    files = [tmp_path / folder / "chats.jsonl" for folder in ("one", "two")]
    for number, file in enumerate(files):
        file.parent.mkdir()
        lines = chats.read_text().splitlines(keepends=True)[15 * number : 15 * number + 15]
        file.write_text("".join(lines) + '{"text": "no conversation"}\n')
    options = ["--epochs", "0.5", "--sampling.max-tokens", "4", "--runs", str(tmp_path / "runs")]
    line = ["sft", str(policy), "--data", str(files[0]), "--data", f"{files[1]}=0.5", *options]
    assert main([*line, "--max-bad-fraction", "0.05"]) == 2
    assert "1 of 16 rows" in capsys.readouterr().err
    assert main([*line, "--max-bad-fraction", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "1 rows of one-chats cannot be used" in said
    assert "one-chats" in said.rpartition("held-out loss")[2]
    (folder,) = (tmp_path / "runs").iterdir()
    run = read_run(folder, SFTRun)
    assert [(s.title, s.weight) for s in run.data] == [("one-chats", 1.0), ("two-chats", 0.5)]


def test_a_wrong_value_of_an_adapter_is_named(policy, chats, capsys):
    for option, value, said in (("rank", "0", "rank is 0"), ("alpha", "-1", "alpha is -1.0")):
        with pytest.raises(SystemExit):
            main(["sft", str(policy), "--data", str(chats), f"--lora.{option}", value])
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
