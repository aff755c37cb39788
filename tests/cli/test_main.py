"""The command: quick to help, and plain when something is wrong."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nemotron3.cli.info
from nemotron3.cli.main import main
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import Tokenizer
from tests.small_run import write_text
from tests.tiny import tiny_config


def fails(capsys, *arguments):
    """The message of a command line that ends with status 2, wrapped lines joined."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return " ".join(captured.err.replace("│", " ").split())


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "latin1.txt").write_bytes("Müller wohnt in Köln".encode("latin1"))
    (folder / "empty").mkdir()
    (folder / "blank.txt").write_text("  \n", encoding="utf-8")
    (folder / "cut.json").write_text('{"config": ', encoding="utf-8")
    (folder / "other.jsonl").write_text('{"body": "text"}\n' * 9, encoding="utf-8")
    (folder / "no-config").mkdir()
    (folder / "no-config" / "README.md").write_text("nothing", encoding="utf-8")
    return folder


BAD_INPUT = {
    "unknown verb": (["bake"], ["invalid choice: 'bake'", "pretrain"]),
    "unknown preset": (["info", "nan"], ["no preset 'nan'", "did you mean 'nano'"]),
    "unknown option of info": (["info", "nano", "--jso", "--bogus"], ["--bogus"]),
    "two pages of info": (
        ["info", "nano", "--precision", "--training", "sft"],
        ["--precision and --training", "give one"],
    ),
    "a model for llama.cpp that is none": (
        ["export", "nowhere", "--format", "gguf"],
        ["nowhere is no directory", "give a model directory"],
    ),
    "context of nothing": (["info", "nano", "--context", "0"], ["--context is 0", "1 or more"]),
    "rank without training": (
        ["info", "nano", "--lora-rank", "8"],
        ["--lora-rank goes with --training"],
    ),
    "targets without a rank": (
        ["info", "nano", "--training", "sft", "--lora-targets", "in_proj"],
        ["--lora-targets goes with --lora-rank"],
    ),
    "an adapter in pre-training": (
        ["info", "nano", "--training", "pretrain", "--lora-rank", "8"],
        ["--lora-rank goes with --training sft or rl"],
    ),
    "targets that name nothing": (
        ["info", "nano", "--training", "rl", "--lora-rank", "8", "--lora-targets", "q_prj"],
        ["--lora-targets has 'q_prj', which names no product", "q_proj"],
    ),
    "a size that is none": (
        ["info", "nano", "--training", "sft", "--device-memory", "much"],
        ["--device-memory", "'much' is no size", "80GB"],
    ),
    "no sequences at a time": (
        ["info", "nano", "--training", "sft", "--batch", "0"],
        ["--batch", "0 is too small"],
    ),
    "no such model folder": (["info", "runs/none/model"], ["runs/none/model is no directory"]),
    "a folder without a model": (
        ["info", "{bad}/no-config"],
        ["no-config holds no config.json", "give a model directory"],
    ),
    "no model of an earlier stage": (
        ["rl", "tiny-rl", "--model", "{bad}/tiny-sft/model", "--name", "none"],
        ["tiny-sft/model is no directory; `nemotron3 sft tiny-sft` makes it"],
    ),
    "no model to fine-tune": (
        ["sft", "{bad}/none/model"],
        ["none/model is no directory; give a model directory"],
    ),
    "unknown recipe": (["pretrain", "tinyy"], ["no recipe 'tinyy'", "did you mean 'tiny'"]),
    "unknown recipe to show": (["show", "tinyy"], ["no recipe 'tinyy'", "did you mean 'tiny'"]),
    "no recipe before options": (["pretrain", "--name", "x"], ["no recipe; name it first"]),
    "no recipe with data": (["pretrain", "--data", "x"], ["no recipe; name it first"]),
    "no recipe with a model": (["pretrain", "--init-from", "x"], ["no recipe; name it first"]),
    "no such model to continue": (
        ["pretrain", "tiny", "--init-from", "{bad}/none"],
        ["none is no directory; give a model directory"],
    ),
    "recipe and record": (["pretrain", "tiny", "--from", "r.json"], ["'tiny'", "not both"]),
    "no such record": (["pretrain", "--from", "none.json"], ["none.json cannot be read"]),
    "a record cut short": (["pretrain", "--from", "{bad}/cut.json"], ["is not JSON", "cut short"]),
    "impossible pattern": (
        ["pretrain", "tiny", "--model.hybrid-override-pattern", "MEQ"],
        ["'MEQ' has 'Q' at position 2", "allowed are M (mamba)"],
    ),
    "heads that do not divide": (
        ["pretrain", "tiny", "--model.mamba.mamba-num-heads", "7"],
        ["mamba_num_heads = 7 is not divisible by n_groups = 2", "change one"],
    ),
    "no whole microbatches": (
        ["pretrain", "tiny", "--training.microbatch-size", "3"],
        ["microbatch_size is 3 and batch_size is 8"],
    ),
    "a word for a number": (
        ["pretrain", "tiny", "--training.steps", "many"],
        ["--training.steps", "'many'"],
    ),
    "unknown option": (["pretrain", "tiny", "--training.stepz", "3"], ["--training.stepz"]),
    "a kind is not a value": (
        ["pretrain", "tiny", "--training.schedule.kind", "cosine"],
        ["--training.schedule.kind"],
    ),
    "no GPU": (
        ["pretrain", "tiny", "--device", "cuda"],
        ["'cuda' was asked for", "use --device cpu"],
    ),
    "no GPU to write with": (
        ["generate", "{bad}/no-config", "Hi", "--device", "cuda"],
        ["'cuda' was asked for", "use --device cpu"],
    ),
    "no such device": (["generate", "x", "Hi", "--device", "tpu"], ["'tpu'", "auto, cpu, cuda"]),
    "no probability": (["generate", "x", "Hi", "--top-p", "3"], ["--top-p is 3.0; it must be"]),
    "no tokens": (["generate", "x", "Hi", "--max-tokens", "0"], ["--max-tokens is 0; it must be"]),
    "no such folder for weights": (
        ["serve", "x", "--enable-weight-updates", "{bad}/none", "--api-key", "k"],
        ["--enable-weight-updates is ", "no directory"],
    ),
    "no such text": (["pretrain", "tiny", "--data", "{bad}/none"], ["no such file", "name a file"]),
    "an empty folder": (["pretrain", "tiny", "--data", "{bad}/empty"], ["no text files in it"]),
    "blank text": (["pretrain", "tiny", "--data", "{bad}/blank.txt"], ["1 of 1 rows", "empty"]),
    "text that is not UTF-8": (
        ["pretrain", "tiny", "--data", "{bad}/latin1.txt"],
        ["is not UTF-8 at byte 1 (value 0xfc)", "iconv -f LATIN1"],
    ),
    "a column that is not there": (
        ["pretrain", "tiny", "--data", "{bad}/other.jsonl"],
        ["9 of 9 rows", "no such column", "column = 'text'"],
    ),
    "no model to write with": (
        ["generate", "{bad}/none", "Hi"],
        ["none is no directory", "give a model directory"],
    ),
    "no model to serve": (["serve", "{bad}/none", "--port", "0"], ["is no directory"]),
    "no time to wait": (
        ["serve", "{bad}/none", "--drain-timeout", "nan"],
        ["--drain-timeout", "nan is no time to wait"],
    ),
    "no model to talk to": (["chat", "{bad}/none"], ["is no directory"]),
    "no port": (["serve", "{bad}/none", "--port", "99999"], ["port 99999", "--port"]),
    "no address": (["serve", "{bad}/none", "--host", "256.0.0.1"], ["256.0.0.1", "--host"]),
    "updates without a key": (
        ["serve", "x", "--enable-weight-updates", "."],
        ["--enable-weight-updates", "NEMOTRON3_API_KEY"],
    ),
    "a negative grace": (["serve", "x", "--reasoning-grace", "-1"], ["--reasoning-grace is -1"]),
    "no body at all": (["serve", "x", "--max-body-mib", "0"], ["--max-body-mib is 0"]),
    "no sequences": (
        ["serve", "{bad}/none", "--port", "0", "--max-num-seqs", "0"],
        ["--max-num-seqs is 0; it must be 1"],
    ),
    "no run to merge": (["merge", "{bad}/none", "{bad}/out"], ["cannot be read", "run.json"]),
}


@pytest.mark.parametrize(("arguments", "said"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_answered_with_the_value_and_the_remedy(
    capsys, bad_files, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMOTRON3_CACHE", str(tmp_path / "cache"))
    message = fails(capsys, *(argument.format(bad=bad_files) for argument in arguments))
    for part in said:
        assert part in message


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model with a tokenizer that knows two languages' worth of bytes, and no more."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(["hello world " * 9], vocab_size=300, num_special_tokens=32)
    tokenizer.save(folder)
    config = tiny_config(vocab_size=300, hidden_size=32)
    LanguageModel.from_config(config).save_pretrained(folder)
    return folder


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from nemotron3.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'tyro', 'rich', 'tokenizers', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("info", "pretrain", "show", "generate", "serve", "chat", "merge"):
        assert f"\n    {verb} " in done.stdout


def test_no_verb_shows_the_help(capsys):
    assert main([]) == 0
    assert "start here:" in capsys.readouterr().out


def test_pretrain_without_a_recipe_shows_recipes_and_options(capsys):
    for arguments in (["pretrain"], ["pretrain", "--help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        for part in (
            "--data PATH",
            "--from RUN.JSON",
            "--runs",
            "tiny-books",
            "parameters with all parts",
        ):
            assert part in shown


def test_help_of_a_recipe_lists_its_values(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "tiny", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--training.optimizer.lr" in shown
    assert "Peak learning rate" in shown
    assert "--data" in shown


def test_show_prints_a_recipe_that_can_be_read_back(capsys):
    from nemotron3.config import from_record  # noqa: PLC0415
    from nemotron3.recipes.pretrain import PretrainRun, tiny  # noqa: PLC0415

    assert main(["show", "tiny"]) == 0
    assert from_record(PretrainRun, json.loads(capsys.readouterr().out)) == tiny()


def test_a_closed_pipe_is_the_end_and_no_error():
    command = f"{sys.executable} -m nemotron3.cli.main show tiny | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stdout == "{\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission")]
)
def test_a_disk_that_takes_no_more_is_named(capsys, monkeypatch, number, said):
    def full(*_, **__):
        raise OSError(number, said, "runs/tiny/summary.json.tmp")

    monkeypatch.setattr(nemotron3.cli.info, "info", full)
    message = fails(capsys, "info", "nano")
    assert said in message
    assert "runs/tiny/summary.json.tmp; free some space or choose another folder" in message


def test_other_errors_of_the_system_are_not_dressed_up(monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(nemotron3.cli.info, "info", broken)
    with pytest.raises(OSError, match="Input/output"):
        main(["info", "nano"])


@pytest.mark.parametrize(("verb", "goes_on"), [("info", False), ("pretrain", True)])
def test_an_interruption_says_how_to_go_on_where_one_can(capsys, monkeypatch, verb, goes_on):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nemotron3.cli.main._run", interrupted)
    assert main([verb, "tiny"]) == 130
    assert ("last checkpoint" in capsys.readouterr().err) is goes_on


@pytest.mark.slow
def test_a_full_disk_while_saving(tmp_path, capsys, monkeypatch):
    """A real small file system, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that are not given here")
    try:
        monkeypatch.setenv("NEMOTRON3_CACHE", str(tmp_path / "cache"))
        text = write_text(tmp_path / "text", documents=20)
        recipe = tmp_path / "recipe.py"
        recipe.write_text(
            "from pathlib import Path\nfrom tests.small_run import small_run\n"
            f"def recipe():\n    return small_run(Path({str(text)!r}), training={{'steps': 40}})\n",
            encoding="utf-8",
        )
        message = fails(capsys, "pretrain", recipe, "--runs", disk / "runs")
        assert "MB free and this save needs" in message or "No space left" in message
        assert "free some space" in message
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("name", "total", "active", "kv", "states_mb"),
    [
        ("nano", 31_577_937_344, 3_227_751_872, 6144, 48.2),
        ("super", 120_668_687_360, None, 8192, 167.8),
        ("ultra", 549_308_968_960, None, 12288, 402.7),
    ],
)
def test_info_as_json(capsys, name, total, active, kv, states_mb):
    assert main(["info", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["total"] == total == sum(facts["parameters"].values())
    assert active is None or facts["total_active"] == active
    assert facts["bytes"]["kv_per_token_bf16"] == kv
    assert facts["bytes"]["ssm_state_per_sequence_fp32"] / 1e6 == pytest.approx(states_mb, abs=0.05)
    per_sequence = sum(
        facts["bytes"][part]
        for part in ("ssm_state_per_sequence_fp32", "conv_state_per_sequence_bf16")
    )
    assert facts["bytes"]["sequence_at_context"] == 8192 * kv + per_sequence
    assert facts["mtp"]["depths"] == (0 if name == "nano" else 2)
    assert facts["training_flops_per_token"] >= 3 * facts["forward_flops_per_token"]


def test_info_page_shows_the_json_numbers(capsys):
    main(["info", "super", "--context", "4096"])
    page = capsys.readouterr().out
    for part in ("120,668,687,360", "88 layers", "40 mamba", "shared by 2 depths", "4,096 tokens"):
        assert part in page


@pytest.mark.parametrize("what", ["pretrain", "sft", "rl"])
def test_info_of_training_shows_the_json_numbers(capsys, what):
    options = ["info", "tiny", "--training", what, "--batch", "2", "--seq-len", "128"]
    assert main([*options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["total"] == sum(part["bytes"] for part in record["parts"])
    assert record["least"] < record["total"]
    main(options)
    page = capsys.readouterr().out
    assert "2 x 128 tokens" in page
    assert all(part["name"] in page for part in record["parts"])
    assert ("engine states" in page) == (what == "rl")
    assert "fits into 80.0 GB" in page


def test_info_of_training_says_what_does_not_fit(capsys):
    main(["info", "nano", "--training", "sft"])
    assert "does not fit into 80.0 GB: 505.2 GB are needed at least" in capsys.readouterr().out
    options = ["--lora-rank", "8", "--recompute", "--device-memory", "79.6GiB"]
    main(["info", "nano", "--training", "sft", *options])
    assert capsys.readouterr().out.rstrip().endswith("fits into 85.5 GB")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["sft"], ["sft", "--lora-rank", "64"], ["rl"], ["rl", "--activations", "float32"]]
)
def test_info_of_training_names_options_that_fit(capsys, options):
    command = ["info", "nano", "--training", *options]
    main([*command, "--json"])
    remedy = json.loads(capsys.readouterr().out)["remedy"]
    main(command)
    assert f"it fits with {remedy['options']}" in capsys.readouterr().out
    without = command[:-2] if "--lora-rank" in command else command
    without = [word for word in without if word not in ("--activations", "float32")]
    main([*without, *remedy["options"].split(), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["total"] == remedy["total"] <= 80 * 10**9
    assert record["remedy"] is None


def test_info_of_training_has_no_options_where_nothing_fits(capsys):
    main(["info", "nano", "--training", "sft", "--device-memory", "40GB"])
    page = capsys.readouterr().out
    assert "does not fit into 40.0 GB" in page
    assert "it fits with" not in page


def test_info_of_a_directory(capsys, model_folder):
    assert main(["info", str(model_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = LanguageModel.from_pretrained(model_folder)
    every = sum(p.numel() for p in model.parameters())
    assert facts["total"] + facts["mtp"]["parameters"] == every
    assert facts["pattern"] == "MEM*E/*E/*E"
    stored = sum(t.nbytes for t in model.state_dict().values())
    assert facts["weights"] == {"bytes": stored, "format": "plain"}


def test_info_counts_the_bytes_of_quantized_weights(capsys, model_folder, tmp_path):
    model = LanguageModel.from_pretrained(model_folder, weights="int8")
    model.save_pretrained(tmp_path / "narrow")
    facts = []
    for folder in (model_folder, tmp_path / "narrow"):
        assert main(["info", str(folder), "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    plain, narrow = facts
    stored = sum(t.nbytes for t in model.state_dict().values())
    assert narrow["weights"] == {"bytes": stored, "format": "int8"}
    assert narrow["weights"]["bytes"] < plain["weights"]["bytes"] / 2
    assert narrow["parameters"] == plain["parameters"]


def test_every_preset_can_be_looked_at(capsys):
    from nemotron3.models.presets import PRESETS  # noqa: PLC0415

    for name in PRESETS:
        assert main(["info", name]) == 0
        assert ModelConfig.preset(name).hybrid_override_pattern in capsys.readouterr().out


def test_generate_shows_the_prompt_and_stops(capsys, model_folder):
    arguments = ["generate", str(model_folder), "hello", "--max-tokens", "12"]
    assert main([*arguments, "--temperature", "0"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("hello")
    assert first.endswith("\n")
    assert main([*arguments, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--temperature", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out != first


def test_generate_keeps_control_characters_from_a_terminal_alone(capsys, model_folder, monkeypatch):
    command = ["generate", str(model_folder), "hello\x1b", "--max-tokens", "500"]
    command += ["--temperature", "100", "--top-p", "1"]
    assert main(command) == 0
    piped = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert len(shown) == len(piped)
    assert shown.startswith("hello␛")
    kept = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda sign: chr(0x2400 + ord(sign[0])), piped)
    assert kept[6:] != piped[6:], "the model wrote none, so nothing was tested"
    assert shown == re.sub(r"[\x80-\x9f]", "�", kept.replace("\x7f", "␡"))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--top-p", "0"], "--top-p is 0.0"),
        (["--top-k", "-3"], "--top-k is -3"),
    ],
)
def test_generate_refuses_values_that_mean_nothing(capsys, model_folder, option, said):
    assert said in fails(capsys, "generate", model_folder, "hello", *option)


def test_generate_refuses_an_empty_prompt(capsys, model_folder):
    assert "prompt is empty" in fails(capsys, "generate", model_folder, "")


def test_a_refused_text_is_not_shown(capsys, model_folder):
    assert main(["generate", str(model_folder), "hello", "--max-tokens", "5000"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "--max-tokens is 5000" in shown.err


def test_paths_in_errors_are_the_users(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("here/config.json").write_text("{")
    assert "here/config.json" in fails(capsys, "info", "here")


def test_info_shows_what_runs_in_what(capsys):
    assert main(["info", "super", "--precision", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["products"]
    found = {(row["part"], row["product"], row["format"]): row for row in rows}
    assert len(found["backbone", "experts experts", "nvfp4"]["layers"]) == 33
    assert found["backbone", "experts experts", "activations"]["layers"][0] == 88 - 14
    assert ("backbone", "mamba out_proj", "mxfp8") in found
    assert ("backbone", "experts gate", "float32") in found
    assert {format for part, _, format in found if part == "mtp"} == {"activations", "float32"}
    assert main(["info", "tiny", "--precision"]) == 0
    page = capsys.readouterr().out
    assert re.search(r"^mamba in_proj +nvfp4 +165,888  0, 2$", page, re.MULTILINE)
    assert main(["info", "tiny", "--precision", "plain"]) == 0
    assert "nvfp4 " not in capsys.readouterr().out
