"""From text to a model that writes, that transformers reads, and that can be merged and replayed.

Sixty updates on made-up sentences; every claim is a number that moved.
"""

import contextlib
import dataclasses
import io
import json
import math

import pytest
import torch

from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.cli.main import main
from nemotron3.config import read_run
from nemotron3.data import LoadTokenizerConfig
from nemotron3.inference.llm import LLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.observe.metrics import read_metrics
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.run_folder import read_summary
from nemotron3.recipes.run_pretrain import PretrainSummary, pretrain
from nemotron3.recipes.samples import SampleConfig
from nemotron3.text import Tokenizer
from tests.small_run import lasting_metrics, small_run, write_text
from tests.tolerances import ORACLE

pytestmark = pytest.mark.slow
STEPS = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with text and a finished run on it."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    run = small_run(
        write_text(home / "text"),
        training={"steps": STEPS, "checkpoint_every_steps": 10, "evaluate_every_steps": 20},
        retention=RetentionConfig(keep_every_steps=10),
        prompts=("Every engine", "The old sailor never"),
        sampling=SampleConfig(max_tokens=40, temperature=0.5),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMOTRON3_CACHE", str(home / "cache"))
        pretrain(run, runs=home / "runs")
    return home


@pytest.fixture
def run_folder(home, monkeypatch):
    monkeypatch.setenv("NEMOTRON3_CACHE", str(home / "cache"))
    return home / "runs" / "small"


def test_losses_fell_and_heads_learnt(run_folder):
    lines = dict(read_metrics(run_folder / "metrics.jsonl"))
    assert list(lines) == list(range(1, STEPS + 1))
    first, last = lines[1], lines[STEPS]
    # It knows nothing, and its logits have a variance of 0.8, which costs half of that.
    assert first["train/loss"] == pytest.approx(math.log(320) + 0.4, abs=0.4)
    assert last["train/loss"] < 0.25 * first["train/loss"]
    for depth in (1, 2):
        assert last[f"train/loss_mtp_{depth}"] < 0.4 * first[f"train/loss_mtp_{depth}"]
        assert last[f"train/mtp_accuracy_{depth}"] > 0.5
    assert lines[60]["eval/loss"] < lines[40]["eval/loss"] < lines[20]["eval/loss"]


def test_held_out_text_costs_less_than_by_simple_models(run_folder):
    summary = read_summary(run_folder, PretrainSummary)
    assert summary.bits_per_byte < 0.25 * summary.baselines["unigram"]
    assert summary.bits_per_byte < summary.baselines["2-gram"]
    assert summary.bits_per_byte < summary.baselines["gzip"]
    assert summary.tokens == STEPS * 4 * 32


def test_all_that_was_promised_is_there(run_folder):
    for name in (
        "run.json",
        "summary.json",
        "metrics.jsonl",
        "report.html",
        "tensorboard",
        "tokenizer/tokenizer.json",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        f"checkpoints/step-{STEPS:08d}/manifest.json",
    ):
        assert (run_folder / name).exists(), name
    assert not list(run_folder.rglob("*.tmp*"))
    page = (run_folder / "report.html").read_text("utf-8")
    for part in ("Every engine", "unigram", "<svg"):
        assert part in page


def test_the_model_writes_words_of_its_text(home, run_folder):
    params = SamplingParams(max_tokens=60, temperature=0)
    (output,) = LLM(run_folder / "model").generate("Every engine ", params)
    text = output.outputs[0].text
    words = [word.strip(".") for word in text.split()[1:-1]]
    known = {w.strip(".") for file in (home / "text").iterdir() for w in file.read_text().split()}
    assert len(words) > 5
    assert sum(word in known for word in words) / len(words) > 0.7


def test_transformers_reads_the_directory_and_gives_our_logits(assert_close, run_folder):
    huggingface = pytest.importorskip("tests.oracles.huggingface")
    from transformers import AutoTokenizer  # noqa: PLC0415

    directory = run_folder / "model"
    ids = Tokenizer.from_directory(directory).encode("My neighbour counts the river. Ünïcode?")
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = AutoTokenizer.from_pretrained(directory)
    assert theirs(" My neighbour counts the river. Ünïcode?"[1:])["input_ids"] == ids
    tokens = torch.tensor([ids])
    wanted = huggingface.logits_of(_load(huggingface, directory), tokens)
    with torch.inference_mode():
        found = LanguageModel.from_pretrained(directory)(tokens)
    assert_close(found, wanted, ORACLE)


def _load(huggingface, directory):
    from transformers import NemotronHForCausalLM  # noqa: PLC0415

    with contextlib.redirect_stderr(io.StringIO()):
        model, report = NemotronHForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    # It has no multi-token prediction, and leaves those tensors aside.
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in report["unexpected_keys"])
    return huggingface.repaired(model).eval()


def test_a_merge_of_its_checkpoints_is_a_sensible_model(capsys, home, run_folder, tmp_path):
    assert main(["merge", str(run_folder), str(tmp_path), "--window-steps", "20"]) == 0
    assert "steps 40, 50, 60" in capsys.readouterr().out
    merged, last = (
        _loss_on_text(home, LanguageModel.from_pretrained(path), path)
        for path in (tmp_path, run_folder / "model")
    )
    assert merged < 1.25 * last
    assert merged < 0.25 * math.log(320)


def _loss_on_text(home, model, path):
    tokenizer = Tokenizer.from_directory(path)
    held_out = next((home / "cache").rglob("held_out/*.jsonl")).read_text("utf-8")
    ids = tokenizer.encode(json.loads(held_out.splitlines()[0])["text"])
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(tokens)
    return torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()


def test_the_record_replays_the_run(capsys, run_folder, tmp_path):
    """The same record under another name and folder gives the same losses, to the last bit."""
    arguments = ["pretrain", "--from", str(run_folder / "run.json"), "--name", "again"]
    assert main([*arguments, "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "bits per byte of held-out text" in shown
    assert "again (this model)" in shown
    assert lasting_metrics(tmp_path / "again") == lasting_metrics(run_folder)
    weights = [path / "model" / "model.safetensors" for path in (run_folder, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    replayed = read_run(tmp_path / "again", PretrainRun)
    assert dataclasses.replace(replayed, name="small") == read_run(run_folder, PretrainRun)


def test_another_run_takes_its_tokenizer(home, run_folder, tmp_path):
    run = read_run(run_folder, PretrainRun)
    loaded = LoadTokenizerConfig(path=str(run_folder / "model"))
    steps = dataclasses.replace(run.training, steps=2)
    second = dataclasses.replace(
        run,
        name="second",
        corpus=dataclasses.replace(run.corpus, tokenizer=loaded),
        training=steps,
        prompts=(),
    )
    pretrain(second, runs=tmp_path)
    fingerprints = {
        Tokenizer.from_directory(path / "model").fingerprint
        for path in (run_folder, tmp_path / "second")
    }
    assert len(fingerprints) == 1


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_own_text_of_every_kind(capsys, home, run_folder, tmp_path, kind):
    texts = [file.read_text("utf-8") for file in sorted((home / "text").iterdir())]
    data = tmp_path / f"data.{kind}"
    match kind:
        case "txt":
            data.write_text("".join(texts), encoding="utf-8")
        case "jsonl":
            rows = [json.dumps({"text": text}) for text in texts]
            data.write_text("\n".join(rows), encoding="utf-8")
        case "parquet":
            parquet = pytest.importorskip("pyarrow.parquet")
            table = pytest.importorskip("pyarrow").table({"text": texts})
            parquet.write_table(table, data)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from pathlib import Path\nfrom tests.small_run import small_run\n"
        "def recipe():\n    return small_run(Path('unused'), training={'steps': 2})\n",
        encoding="utf-8",
    )
    arguments = ["pretrain", str(recipe), "--data", str(data), "--runs", str(tmp_path / "runs")]
    assert main([*arguments, "--evaluation-rows", "2", "--baselines.order", "3"]) == 0
    folder = tmp_path / "runs" / "small-own-text"
    assert "3-gram" in capsys.readouterr().out
    record = json.loads((folder / "run.json").read_text("utf-8"))
    (source,) = record["extra"]["corpus"]["sources"]
    assert source["origin"] == str(data)
    documents = source["train"]["documents"] + source["held_out"]["documents"]
    assert documents == (2 if kind == "txt" else len(texts))  # one text is cut in two
    assert record["config"]["evaluation_rows"] == 2
