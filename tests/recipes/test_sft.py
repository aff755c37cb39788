"""Whole fine-tuning runs: what is learned, kept and refused."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemotron3 import LLM, SamplingParams
from nemotron3.config import read_run, write_run
from nemotron3.data.conversations import ConversationsConfig
from nemotron3.errors import ConfigError, DataError
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.observe.metrics import read_metrics
from nemotron3.recipes import run_sft
from nemotron3.recipes.demonstrations import DemonstrationsConfig
from nemotron3.recipes.own_conversations import own_conversations
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.run_sft import sft
from nemotron3.recipes.samples import SampleConfig
from nemotron3.recipes.sft import SFTRun
from nemotron3.recipes.sft_data import prepare_sft_data
from nemotron3.text import Tokenizer
from nemotron3.training.sft_objective import NormalisationStage, SFTLossConfig
from tests.small_run import killed_after
from tests.tiny import tiny_config

WORDS = ("harbour", "lantern", "clock", "road", "river", "engine", "sailor", "child")
VOCABULARY = 320


def rows(count, seed=0):
    """The model is to say a word back."""
    draw = random.Random(seed)
    for _ in range(count):
        said = " ".join(draw.choice(WORDS) for _ in range(2))
        yield {
            "messages": [
                {"role": "user", "content": said},
                {"role": "assistant", "content": said, "reasoning_content": said[::-1]},
            ]
        }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    config = tiny_config("ME*-E/*E/*E", vocab_size=VOCABULARY, hidden_size=32)
    LanguageModel.from_config(config, seed=0).save_pretrained(folder)
    text = ["user\nassistant\n", *(json.dumps(row) for row in rows(50))]
    Tokenizer.train(text, vocab_size=VOCABULARY).save(folder)
    return folder


@pytest.fixture
def chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(40)), encoding="utf-8")
    return file


def small(base, chats, **changes):
    run = own_conversations(
        base, [ConversationsConfig(path=str(chats))], name="small", epochs=2, batch_size=4
    )
    changes = {"device": "cpu", "sampling": SampleConfig(max_tokens=4), "num_samples": 2} | changes
    training = replace(run.training, **changes.pop("training", {}))
    return replace(run, training=training, **changes)


def metrics_of(folder):
    return dict(read_metrics(folder / "metrics.jsonl"))


def test_a_run_fits_the_conversations_and_its_result_is_a_chat_model(base, chats, tmp_path):
    run = small(base, chats)
    assert run.training.seq_len % 64 == 0
    stages = []

    class Listener(RunCallback):
        def stage(self, message):
            stages.append(message)

    summary = sft(run, runs=tmp_path / "runs", callback=Listener())
    folder = tmp_path / "runs" / "small"
    assert summary.loss["all"] < summary.loss_before["all"]
    assert summary.loss["chats"] == summary.loss["all"]
    assert summary.conversations == {"chats": 38}
    assert len(summary.samples) == 2
    assert (folder / "report.html").exists()
    assert not (folder / "best").exists()
    model = folder / "model"
    generation = json.loads((model / "generation_config.json").read_text())
    tokenizer = Tokenizer.from_directory(model)
    assert set(generation["eos_token_id"]) == set(tokenizer.stop_ids)
    assert "<|im_start|>" in (model / "chat_template.jinja").read_text()
    llm = LLM(model)
    params = SamplingParams(max_tokens=3, temperature=0.0)
    assert llm.chat([{"role": "user", "content": "clock"}], params)[0].outputs[0].token_ids
    again = sft(run, runs=tmp_path / "runs", callback=Listener())
    assert again == summary
    assert "is finished" in stages[-1]


def test_the_result_is_the_best_model_and_its_loss_is_that_of_the_files(base, chats, tmp_path):
    """A learning rate that destroys the model leaves the first one."""
    run = small(base, chats, training={"evaluate_every_steps": 1})
    optimizer = replace(run.training.optimizer, lr=3.0)
    run = replace(run, training=replace(run.training, optimizer=optimizer))
    summary = sft(run, runs=tmp_path / "runs")
    losses = {step: m["eval/loss"] for step, m in metrics_of(tmp_path / "runs/small").items()}
    best = min([(summary.loss_before["all"], 0), *((loss, step) for step, loss in losses.items())])
    assert (summary.loss["all"], summary.best_step) == best
    result = LanguageModel.from_pretrained(tmp_path / "runs/small/model")
    if summary.best_step == 0:
        for name, tensor in LanguageModel.from_pretrained(base).state_dict().items():
            assert torch.equal(result.state_dict()[name], tensor), name


def check_that_a_killed_run_goes_on(train, runs, *, files=()):
    """`train(runs)` with and without an interruption: the same summary, losses and files."""
    whole = train(runs / "whole")
    with killed_after(2):
        train(runs / "cut")
    assert not (runs / "cut/small/model").exists()
    cut = train(runs / "cut")
    assert replace(cut, seconds=0.0) == replace(whole, seconds=0.0)
    ours, theirs = (metrics_of(runs / name / "small") for name in ("cut", "whole"))
    for step, metrics in theirs.items():
        for name in ("train/loss", "eval/loss"):
            assert ours[step][name] == metrics[name]
    for file in files:
        one, other = (runs / name / "small" / file for name in ("cut", "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_a_run_that_was_killed_goes_on_to_the_same_losses(base, chats, tmp_path):
    run = small(base, chats, training={"checkpoint_every_steps": 1, "evaluate_every_steps": 1})
    check_that_a_killed_run_goes_on(lambda runs: sft(run, runs=runs), tmp_path)


@pytest.mark.parametrize("what", ["data", "model"])
def test_a_run_does_not_go_on_with_other_inputs(base, chats, tmp_path, what):
    own = tmp_path / "base" / "model"
    own.parent.mkdir()
    LanguageModel.from_pretrained(base).save_pretrained(own)
    run = small(own, chats, training={"checkpoint_every_steps": 1})
    with killed_after(1):
        sft(run, runs=tmp_path / "runs")
    if what == "data":
        chats.write_text(chats.read_text().replace("harbour", "haven"))
    else:
        LanguageModel.from_config(
            LanguageModel.from_pretrained(base).config, seed=1
        ).save_pretrained(own)
    named = {"data": "edited: .*chats.jsonl", "model": "edited: .*model.safetensors"}[what]
    with pytest.raises(ConfigError, match=f"begun with other inputs.*{named}.*--name"):
        sft(run, runs=tmp_path / "runs")


def test_both_normalisations_one_after_another(base, chats, tmp_path):
    stages = (
        NormalisationStage(normalisation="token", until=0.5),
        NormalisationStage(normalisation="sequence"),
    )
    run = small(base, chats, loss=SFTLossConfig(stages=stages))
    seen = []
    real = run_sft.SFTObjective.counts

    def counts(self, batch):
        found = real(self, batch)
        seen.append((batch.normalisation, found["targets"], len(batch.segments)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_sft.SFTObjective, "counts", counts)
        sft(run, runs=tmp_path / "runs")
    kinds = [kind for kind, *_ in seen]
    assert kinds == sorted(kinds, reverse=True)
    assert set(kinds) == {"token", "sequence"}
    for kind, count, conversations in seen:
        assert (count == conversations) == (kind == "sequence")


def test_a_loss_needs_stages_that_end_at_one():
    for ends in [(), (0.5,), (0.5, 0.5, 1.0), (1.0, 0.5), (0.0, 1.0)]:
        with pytest.raises(ConfigError, match=r"loss.stages end at"):
            SFTLossConfig(stages=tuple(NormalisationStage(until=end) for end in ends))


def write(file, conversations):
    text = "".join(json.dumps(row) + "\n" for row in conversations)
    file.write_text(text, encoding="utf-8")
    return ConversationsConfig(path=str(file))


def test_own_held_out_conversations_and_two_sources(base, chats, tmp_path):
    """What is to be looked at alone is not trained on where a source has it, too."""
    looked = [{"prompt": f"road {n}", "completion": "river"} for n in range(5)]
    other = write(tmp_path / "other.jsonl", [*rows(9, seed=4), *looked[:2]])
    sources = (ConversationsConfig(path=str(chats)), other)
    run = replace(
        small(base, chats), data=sources, held_out=(write(tmp_path / "looked.jsonl", looked),)
    )
    summary = sft(run, runs=tmp_path / "runs")
    assert summary.conversations == {"chats": 40, "other": 9}
    assert set(summary.loss) == {"all", "looked"}
    only = replace(run, data=(write(tmp_path / "only.jsonl", looked[:2]),))
    with pytest.raises(DataError, match="all 2 conversations of only are held out"):
        prepare_sft_data(only)


def test_what_one_source_holds_out_no_other_trains_on(base, chats, tmp_path):
    """Also with other ids, flags, columns and tags around the reasoning."""
    shared = [*rows(40)]
    for row in shared:
        answer = row["messages"][1]
        thought = answer.pop("reasoning_content")
        answer["content"] = f"<think>\n{thought}\n</think>\n{answer['content']}"
        row["source"] = "elsewhere"
    copy = write(tmp_path / "copy.jsonl", [*rows(60, seed=9), *reversed(shared)])
    run = replace(
        small(base, chats), data=(ConversationsConfig(path=str(chats)), copy), max_held_out=3
    )
    data = prepare_sft_data(run)

    def texts(parts):
        return {
            name: {data.tokenizer.decode(c.ids.tolist()) for c in rows}
            for name, rows in parts.items()
        }

    trained = texts({name: source.conversations for name, source in data.train.items()})
    held = texts(data.held_out)
    assert held["chats"] & held["copy"]
    assert not (trained["chats"] | trained["copy"]) & (held["chats"] | held["copy"])
    renamed = replace(run, data=(copy, replace(run.data[0], name="other name")))
    again = texts(prepare_sft_data(renamed).held_out)
    assert (again["copy"], again["other name"]) == (held["copy"], held["chats"])


def test_rows_that_the_template_refuses_are_counted_as_unusable(base, tmp_path):
    refused = {**next(rows(1)), "effort": "colossal"}
    deep = json.dumps({**next(rows(1)), "tools": []}).replace("[]", "[" * 400 + "]" * 400)
    source = write(tmp_path / "chats.jsonl", [*rows(20), refused])
    with Path(source.path).open("a") as file:
        file.write(deep + "\n")
    with pytest.raises(DataError, match=r"chats.jsonl:21: .*colossal"):
        own_conversations(base, [source])
    allowed = replace(source, max_bad_fraction=0.2)
    assert prepare_sft_data(own_conversations(base, [allowed])).bad_rows == {"chats": 2}


@pytest.mark.parametrize("seed", range(4))
def test_conversations_that_no_row_can_hold_are_not_the_ones_held_out(base, tmp_path, seed):
    long = [
        {"prompt": f"{n} " + "clock " * 200, "completion": "road river " * 20} for n in range(30)
    ]
    source = write(tmp_path / "chats.jsonl", [*long, *rows(4)])
    run = small(base, source.path, seed=seed, training={"seq_len": 128})
    data = prepare_sft_data(run)
    fitting = [len(c) for c in data.held_out["chats"]]
    assert fitting
    assert max(fitting) <= 128
    assert any(len(c) <= 128 for c in data.train["chats"].conversations)


def test_a_held_out_conversation_that_is_the_longest_has_a_row(base, tmp_path):
    """The length of rows is found from all conversations, so the same ones are held out."""
    for number in range(6):
        longest = {"prompt": "clock " * 60, "completion": f"road {number}"}
        source = write(tmp_path / f"chats{number}.jsonl", [longest, *rows(2, seed=number)])
        run = own_conversations(base, [source], epochs=1)
        data = prepare_sft_data(run)
        (held,) = data.held_out.values()
        assert len(held) == 1
        assert len(held[0]) <= run.training.seq_len


def test_a_conversation_is_never_in_both_parts(base, tmp_path):
    file = tmp_path / "twice.jsonl"
    few = [*rows(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in few * 20))
    run = small(base, file)
    data = run_sft.prepare_sft_data(run)
    train = {c.ids.tobytes() for c in data.train["twice"].conversations}
    held_out = {c.ids.tobytes() for c in data.held_out["twice"]}
    assert held_out
    assert train
    assert not train & held_out


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", DataError, "has no rows"),
        ('{"prompt": "a", "completion": "b"}\n' * 3, DataError, "1 different conversations"),
        ('{"prompt": "a"}\n', DataError, "chats.jsonl:1: the row has prompt"),
    ],
)
def test_bad_data_is_an_error_before_anything_is_written(base, tmp_path, text, error, said):
    file = tmp_path / "chats.jsonl"
    file.write_text(text)
    with pytest.raises(error, match=said):
        small(base, file)
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]


def test_a_foreign_chat_template_is_refused_unless_a_style_is_named(base, chats, tmp_path):
    folder = tmp_path / "foreign"
    LanguageModel.from_pretrained(base).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    source = [ConversationsConfig(path=str(chats))]
    with pytest.raises(ConfigError, match=r"of another family.*--chat-style to one of nano"):
        own_conversations(folder, source)
    run = replace(small(base, chats), model=str(folder), chat_style="super")
    assert run_sft.prepare_sft_data(run).template.style.name == "super"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": ()}, "data is empty"),
        ({"held_out_fraction": 0.0}, "held_out_fraction is 0.0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction is 1.0"),
    ],
)
def test_settings_are_checked(base, chats, changes, said):
    with pytest.raises(ConfigError, match=said):
        small(base, chats, **changes)
    source = ConversationsConfig(path=str(chats))
    with pytest.raises(ConfigError, match="two sources named 'chats'"):
        small(base, chats, data=(source, source))


def test_a_recorded_run_can_be_read_again(base, chats, tmp_path):
    run = small(base, chats)
    write_run(tmp_path / "record", run)
    assert read_run(tmp_path / "record", SFTRun) == run
    assert Path(run.model) == base


def test_demonstrations_of_environments_are_a_source(base, tmp_path):
    solved = DemonstrationsConfig(environment="list_operations", num_tasks=30, difficulty=0.0)
    run = SFTRun(
        name="solved",
        model=str(base),
        demonstrations=(solved,),
        training=replace(small(base, *_none(tmp_path)).training, seq_len=192),
        device="cpu",
        num_samples=1,
        sampling=SampleConfig(max_tokens=4),
    )
    data = prepare_sft_data(run)
    again = prepare_sft_data(run)
    ids = [c.ids.tolist() for c in data.train["list_operations"].conversations]
    assert ids == [c.ids.tolist() for c in again.train["list_operations"].conversations]
    held_out = {repr(c.messages) for c in data.held_out_conversations["list_operations"]}
    assert held_out
    assert len(ids) + len(data.held_out_conversations["list_operations"]) == 30
    summary = sft(run, runs=tmp_path / "runs")
    assert summary.loss["list_operations"] < summary.loss_before["list_operations"]


def test_a_share_of_the_demonstrations_follows_others(base, tmp_path):
    """Where a row holds them; what is trained are the answers that it trained alone."""
    run = SFTRun(
        name="solved",
        model=str(base),
        demonstrations=tuple(
            DemonstrationsConfig(environment=name, num_tasks=40, difficulty=0.0)
            for name in ("list_operations", "letter_counting")
        ),
        training=replace(small(base, *_none(tmp_path)).training, seq_len=256),
        device="cpu",
    )
    follows = replace(run, follow_up_fraction=0.5)
    alone, joined, again = (prepare_sft_data(each) for each in (run, follows, follows))
    longer = 0
    for name, source in joined.train.items():
        same = again.train[name].conversations
        for one, two, three in zip(
            alone.train[name].conversations, source.conversations, same, strict=True
        ):
            assert two.ids.tolist() == three.ids.tolist()
            assert one.ids[one.is_target].tolist() == two.ids[two.is_target].tolist()
            assert len(two) <= 256
            longer += len(two) > len(one)
    assert 20 <= longer <= 50
    every = [c for source in alone.train.values() for c in source.conversations]
    short = replace(run.training, seq_len=max(map(len, every)))
    for name, source in prepare_sft_data(replace(follows, training=short)).train.items():
        assert all(len(c) <= short.seq_len for c in source.conversations), name
    with pytest.raises(ConfigError, match=r"follow_up_fraction is 1\.5; it must be from 0 to 1"):
        replace(run, follow_up_fraction=1.5)
    with pytest.raises(ConfigError, match="and there are no demonstrations"):
        small(base, *_none(tmp_path), follow_up_fraction=0.1)


def _none(folder):
    file = folder / "few.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(8)), encoding="utf-8")
    return [file]


def test_demonstrations_that_cannot_be_had_are_an_error_before_training(base, tmp_path):
    with pytest.raises(ConfigError, match="num_tasks is 1"):
        DemonstrationsConfig(environment="math", num_tasks=1)
    with pytest.raises(ConfigError, match="weight is 0"):
        DemonstrationsConfig(environment="math", num_tasks=9, weight=0.0)
    run = small(base, *_none(tmp_path), name="bad")
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        sft(
            replace(run, demonstrations=(DemonstrationsConfig(environment="maths", num_tasks=9),)),
            runs=tmp_path / "runs",
        )
