"""`nemotron3 eval` and `nemotron3 compare`, as they are typed."""

import json
from dataclasses import replace

import pytest

from nemotron3.cli.evaluate import _all_named
from nemotron3.cli.main import main
from nemotron3.config import to_record, write_json, write_run
from nemotron3.environments import BUILT_IN
from nemotron3.evaluation.results import read_evaluation
from nemotron3.models.lora import LoRAConfig, add_lora, write_adapter
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.observe.metrics import MetricLog
from nemotron3.observe.sinks import JsonlSink
from nemotron3.recipes.adapters import merge_adapter_directory
from nemotron3.recipes.own_environments import own_environments
from nemotron3.recipes.pretrain import tiny
from nemotron3.recipes.run_folder import ROLLOUTS_FILE
from nemotron3.rl.records import AFTER_TRAINING, RolloutRecord
from nemotron3.rl.sampling_plan import EnvironmentConfig
from tests.models.lora.adapted import with_change
from tests.observe.test_report import checked
from tests.rl.playground import save_policy

SHORT = ["--num-tasks", "12", "--max-tokens", "6", "--max-num-seqs", "12"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("base") / "model")


def evaluate(policy, out, *options):
    assert main(["eval", str(policy), "--json", str(out), *SHORT, *options]) == 0
    return read_evaluation(out)


def test_environments_and_text_are_measured_and_recorded(policy, tmp_path, capsys):
    text = tmp_path / "held.txt"
    text.write_text("say 3 up and down")
    out = tmp_path / "first.json"
    options = ["--environment", "lookup=0", "--environment", "multiple_choice", "--difficulty"]
    found = evaluate(policy, out, *options, "0.1", "--data", str(text))
    said = capsys.readouterr().out
    assert "12 different held-out tasks of each environment, sampled at temperature 1" in said
    assert "is_answerable = yes" in said
    mean = sum(each.reward.mean for each in found.environments.values()) / 2
    assert f"mean of environments       {mean:.3f}\n" in said
    assert "bits/byte" in said
    assert found.settings.difficulties == {"lookup": 0.0, "multiple_choice": 0.1}
    assert list(found.environments) == ["lookup", "multiple_choice"]
    assert len(found.tasks) == 24
    assert found.texts[str(text)].bits_per_byte > 0
    again = evaluate(policy, tmp_path / "again.json", *options, "0.1")
    assert again.tasks == found.tasks
    greedy = evaluate(policy, tmp_path / "greedy.json", *options, "0.1", "--temperature", "0")
    assert [each.prompt for each in greedy.tasks] == [each.prompt for each in found.tasks]
    assert greedy.tasks != found.tasks


def test_an_adapter_is_measured_as_its_merged_model(policy, tmp_path):
    config = LoRAConfig(rank=2)
    model = LanguageModel.from_pretrained(policy)
    add_lora(model, config, seed=0)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    write_adapter(adapter, with_change(model), config, base=str(policy))
    merge_adapter_directory(policy, adapter, merged)
    options = ("--environment", "lookup=0")
    found = evaluate(policy, tmp_path / "with.json", *options, "--lora", str(adapter))
    assert found.name == str(adapter)
    assert found.tasks == evaluate(merged, tmp_path / "merged.json", *options).tasks
    assert found.tasks != evaluate(policy, tmp_path / "without.json", *options).tasks


def test_an_environment_of_ones_own_is_one_file(policy, tmp_path, capsys):
    from tests.recipes.small_rl import LETTER  # noqa: PLC0415 - one definition of the file

    file = tmp_path / "letter.py"
    file.write_text(LETTER)
    found = evaluate(policy, tmp_path / "own.json", "--environment", str(file))
    assert found.environments["letter"].reward.n == 12
    assert "letter" in capsys.readouterr().out


def test_all_stands_for_every_built_in_environment():
    assert _all_named(["all"]) == list(BUILT_IN)
    assert _all_named(["math=0.2", "all=0.1"]) == ["math=0.2", *(f"{n}=0.1" for n in BUILT_IN)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to measure; name an environment"),
        (["--environment", "maths"], "did you mean 'math'"),
        (["--environment", "math", "--environment", "math=0.3"], "two environments named 'math'"),
        (["--environment", "math=2"], "difficulty is 2.0"),
        (["--environment", "math", "--num-tasks", "0"], "--num-tasks is 0"),
        (["--environment", "math", "--temperature", "-1"], "--temperature is -1.0; it must be"),
        (["--environment", "math", "--budget", "-1"], "--budget is -1; it must be 0 or more"),
        (["--environment", "math", "--max-num-seqs", "0"], "--max-num-seqs is 0"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--data", "README.md", "--difficulty", "0.1"], "--difficulty goes with --environment"),
        (["--environment", "math", "--limit", "3"], "--limit goes with --tasks"),
        (["--environment", "math", "--json", "."], "--json . is a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(policy, arguments, said, capsys):
    assert main(["eval", str(policy), *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Reading" not in printed.out


def test_prompts_that_fill_the_context_are_refused_with_the_longest(policy, tmp_path, capsys):
    out = tmp_path / "out.json"
    line = ["eval", str(policy), "--json", str(out), *SHORT, "--environment", "lookup=0.5"]
    assert main([*line, "--max-context", "20"]) == 2
    said = capsys.readouterr().err
    assert "--max-context is 20, which 12 of 12 prompts fill" in said
    assert not out.exists()
    needed = int(said.partition("Raise it to ")[2].partition(",")[0])
    assert f"has {needed - 6} tokens" in said
    found = evaluate(policy, out, "--environment", "lookup=0.5", "--max-context", str(needed))
    assert found.environments["lookup"].tokens == 6
    assert main([*line, "--max-context", str(needed - 6)]) == 2
    assert "which 1 of 12" in capsys.readouterr().err


def test_a_path_that_is_no_model_is_refused(policy, capsys):
    run = policy.parent
    assert main(["eval", str(run), "--environment", "math"]) == 2
    assert f"{run} holds no config.json; give {policy}" in (capsys.readouterr().err)


def pretrained(folder, *, loss=3.0, name="one", bits=1.5):
    run = replace(tiny(), name=name)
    path = folder / name
    write_run(path, run)
    with MetricLog([JsonlSink(path / "metrics.jsonl", next_step=0)]) as log:
        for step in range(1, 6):
            metrics = {"train/loss": loss / step, "optim/lr": 0.1, "moe/max_vio_layer_01": 0.5}
            log.log(step, metrics)
    if bits is not None:
        summary = {"bits_per_byte": bits, "by_source": {"a": bits}, "seconds": 60.0}
        write_json(path / "summary.json", summary | {"parameters": 12})
    return path


def reinforced(folder, policy, rewards, *, name="rl"):
    run = own_environments(policy, [EnvironmentConfig(name="math")], name=name)
    path = folder / name
    write_run(path, run)
    mean = sum(rewards) / len(rewards)
    summary = {"reward": {"all": mean, "math": mean}, "tokens": {"all": 3.0, "math": 3.0}}
    summary["most_common"] = {"math": 0.5}
    write_json(path / "summary.json", summary | {"seconds": 60.0, "parameters": 12})
    tasks = [
        RolloutRecord(
            when=AFTER_TRAINING,
            environment="math",
            group=n,
            prompt=f"<b>{n}</b>",
            messages=(),
            components={},
            reward=reward,
            failure=None,
            tokens=3,
            is_cut=False,
            answer="",
            labels={},
        )
        for n, reward in enumerate(rewards)
    ]
    lines = [json.dumps(to_record(task)) + "\n" for task in tasks]
    (path / ROLLOUTS_FILE).write_text("".join(lines))
    return path


def compared(tmp_path, capsys, *paths, options=()):
    out = tmp_path / "compare.html"
    status = main(["compare", *map(str, paths), "--out", str(out), *options])
    printed = capsys.readouterr()
    return status, printed, out.read_text() if out.exists() else ""


def test_two_runs_have_a_table_and_their_curves_in_one_page(tmp_path, capsys):
    paths = pretrained(tmp_path), pretrained(tmp_path, name="<two>", bits=1.25)
    status, printed, page = compared(tmp_path, capsys, *paths)
    assert status == 0
    assert "one (pretrain)  <two> (pretrain)" in printed.out
    assert [line.split()[-2:] for line in printed.out.splitlines() if "byte" in line] == [
        ["1.5", "1.25"],
        ["1.5", "1.25"],
    ]
    assert checked(page).headings == [
        "Results",
        "Quality",
        "train/loss",
        "Optimisation",
        "optim/lr",
    ]
    assert page.count("&lt;two&gt;") > 2
    assert page.count("<svg") == 2


def test_a_run_that_goes_on_is_compared_by_its_last_step(tmp_path, capsys):
    paths = pretrained(tmp_path, bits=None), pretrained(tmp_path, name="two", bits=None)
    status, printed, _ = compared(tmp_path, capsys, *paths)
    assert status == 0
    assert "train/loss, step 5" in printed.out


def test_runs_with_rewards_of_the_same_tasks_are_tested(policy, tmp_path, capsys):
    before = reinforced(tmp_path, policy, [0.0] * 60 + [1.0] * 40)
    better = reinforced(tmp_path, policy, [0.0] * 40 + [1.0] * 60, name="better")
    alike = reinforced(tmp_path, policy, [0.0] * 59 + [1.0] * 41, name="alike")
    status, printed, page = compared(tmp_path, capsys, before, better, alike)
    assert status == 0
    rows = [line for line in printed.out.splitlines() if line.startswith("math: ")]
    assert [" holds " in rows[0], "better by +0.200" in rows[0]] == [True, True]
    assert "does not hold" in rows[1] or "cannot be told" in rows[1]
    assert "corrected for 2 tests, intervals at 97.5%" in printed.out
    assert "Paired tests" in checked(page).headings


def test_evaluations_are_tested_task_by_task(policy, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    evaluate(policy, first, "--environment", "lookup=0")
    evaluate(policy, second, "--environment", "lookup=0", "--temperature", "0")
    capsys.readouterr()
    status, printed, page = compared(tmp_path, capsys, first, second)
    assert status == 0
    assert "lookup: second - first" in printed.out
    assert (
        "note: first and second were measured with another rollouts.temperature: 1.0 and 0.0"
        in (printed.out)
    )
    assert "rollouts.temperature" in page


def test_other_tasks_are_not_tested(policy, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    evaluate(policy, first, "--environment", "lookup=0")
    evaluate(policy, second, "--environment", "lookup=0", "--seed", "5")
    capsys.readouterr()
    status, printed, _ = compared(tmp_path, capsys, first, second)
    assert status == 0
    assert "of 12 tasks of first are among the 12 of second" in printed.out


def test_what_cannot_be_compared_is_refused(policy, tmp_path, capsys):
    one = pretrained(tmp_path)
    empty, other = tmp_path / "empty", tmp_path / "other.json"
    empty.mkdir()
    other.write_text("{}")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    older = tmp_path / "older.json"
    older.write_text('{"kind": "evaluation", "name": "a"}')
    odd = pretrained(tmp_path, name="odd")
    (odd / "summary.json").write_text('{"loss": 3}')
    torn = pretrained(tmp_path, name="torn")
    (torn / "metrics.jsonl").write_text("{}\n")
    begun = tmp_path / "begun"
    write_run(begun, replace(tiny(), name="begun"))
    reward = reinforced(tmp_path, policy, [1.0])
    for paths, said in (
        ([one], "one run is no comparison"),
        ([one, one], "is named twice"),
        ([one, empty], f"{empty} is no run, for it holds no run.json"),
        ([one, policy], "it is a model; name its run, or evaluate it"),
        ([one, tmp_path / "missing"], "does not exist"),
        ([one, other], "is no evaluation"),
        ([one, broken], "cannot be read as JSON"),
        ([one, begun], "has no results yet"),
        ([one, older], "is an evaluation of another version"),
        ([one, odd], "cannot be read as a finished run of kind pretrain (KeyError('by_source'))"),
        ([one, torn], "line 1 is not a step"),
    ):
        status, printed, _ = compared(tmp_path, capsys, *paths)
        assert status == 2, paths
        assert said in printed.err
    status, printed, _ = compared(tmp_path, capsys, one, reward, options=["--alpha", "2"])
    assert status == 2
    assert main(["compare", str(one), str(reward), "--out", str(tmp_path)]) == 2
    assert "--out is" in capsys.readouterr().err


def test_runs_without_anything_in_common_are_refused(policy, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    evaluate(policy, first, "--environment", "lookup=0")
    evaluate(policy, second, "--environment", "math=0")
    capsys.readouterr()
    status, printed, page = compared(tmp_path, capsys, first, second)
    assert status == 2
    assert "nothing in common to compare: first (evaluation) has reward, lookup" in printed.err
    assert page == ""
