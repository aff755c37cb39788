"""The benchmarks run at toy size and measure what they claim; no figure is judged here."""

import json
import sys
from collections import Counter

import pytest
import torch
from benchmarks.layers import clocked, flops_per_token, parts_of, profiled, watched
from benchmarks.models import TOLERANCE, build_pair, configs, our_loss, parity, tokens_of
from benchmarks.timing import interleave

from benchmarks import (
    bfloat16,
    cpu,
    limits,
    machine,
    page,
    products,
    profile_layers,
    scaling,
    timing,
)
from nemotron3.models.costs import forward_flops_per_token, model_costs
from nemotron3.models.nemotron_h import LanguageModel
from tests.tiny import tiny_config

SIZES = cpu.Sizes(
    train_batch=2, train_length=16, prefill_lengths=(16,), decode_batches=(1, 2), decode_steps=2
)


@pytest.fixture(autouse=True)
def _quick_limits(monkeypatch):
    names = ("product_flops", "library_product_flops", "read_bytes", "copy_bytes")
    fake = {f"{name}_per_s": 1e11 for name in names}
    monkeypatch.setattr(machine, "limits", lambda: fake)
    monkeypatch.setattr(machine, "READ_MEGABYTES", 1)
    monkeypatch.setattr(machine, "MOMENT", 1e-3)
    monkeypatch.setattr(timing, "PAUSE_S", 0.0)
    monkeypatch.setattr(timing, "TURN_S", 0.0)


@pytest.fixture
def model():
    return LanguageModel.from_config(configs()["toy"])


def test_no_module_does_its_work_behind_the_profilers_back(model):
    entered = Counter()
    with watched(model, lambda part: entered.update([part]), lambda: None):
        our_loss(model, tokens_of(model.config, 2, 5))
    assert entered == Counter(parts_of(model).values())


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_comparison_fills_the_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu, "Sizes", lambda: SIZES)
    cpu.main(["--models", "toy", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("cpu-*.json")
    toy = json.loads(path.read_text())["models"]["toy"]
    names = ["train", "prefill 16", "decode, batch 1", "decode, batch 2"]
    assert [figure["name"] for figure in toy["figures"]] == names
    assert all(figure["ratio"]["transformers"] > 0 for figure in toy["figures"])
    for figure in toy["figures"]:
        most = figure["limit_per_s"] / figure["demand_per_token"]
        share = figure["share_of_limit"]["transformers"]
        assert figure["tokens_per_s"]["transformers"]["median"] == pytest.approx(share * most)
    assert toy["train_memory"]["bytes"]["ours"]["total"] > 0
    assert "llama.cpp is left out" in capsys.readouterr().out
    text = page.render(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "| decode, batch 2 |" in text
    assert "Each row says" not in text
    only = ["--models", "toy", "--only", "decode", "--repeats", "1", "--threads", "1"]
    cpu.main([*only, "--out", str(tmp_path)])
    again = json.loads(path.read_text())["models"]["toy"]
    assert [figure["name"] for figure in again["figures"]] == names
    same = [a == b for a, b in zip(toy["figures"], again["figures"], strict=True)]
    assert same == [True, True, False, False]
    assert toy["train_memory"] == again["train_memory"]
    page.render(page.PAGE.read_text(encoding="utf-8"), tmp_path)


def _figure(name, run):
    rate = {"median": 2.0, "min": 1.0, "max": 3.0}
    return {
        "name": name,
        "limit": "read_bytes_per_s",
        "tokens_per_s": {"ours": rate},
        "ratio": {},
        "share_of_limit": {"ours": 0.5},
        "run": run,
    }


def test_rows_name_the_run_they_come_from(tmp_path):
    runs = [
        {
            "command": "measure",
            "date": "2026-01-01",
            "machine": machine.description() | {"commit": c, "load_before": 0, "load_after": 0},
        }
        for c in ("abc", "def")
    ]
    sizes = {"parameters": 1, "active": 1}
    first = [_figure("train", runs[0]), _figure("decode", runs[0])]
    old = {"models": {"toy": sizes | {"figures": first}, "broken": sizes | {"figures": first}}}
    new = {"models": {"toy": sizes | {"figures": [_figure("decode", runs[1])]}}}
    new["models"]["broken"] = sizes | {"figures": []}
    (tmp_path / "cpu-2026-01-01.json").write_text(json.dumps(cpu.merge(old, new)))
    text = page.render(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "1. `measure` at commit abc" in text
    assert "2. `measure` at commit def" in text
    assert "| train | 2 (1 to 3) | 50% of read | 1 |" in text
    assert "| decode | 2 (1 to 3) | 50% of read | 2 |" in text
    assert "Not compared" in text


@pytest.mark.parametrize(
    ("described", "name"),
    [("Intel(R) Xeon(R) Processor", "intel-xeon"), ("AMD EPYC", "amd-epyc"), ("arm64", "arm64")],
)
def test_each_processor_has_a_table_of_its_own(described, name, tmp_path):
    assert machine.processor_name(described) == name
    for cpu_name, file in ((described, name), ("another", "another")):
        described_machine = machine.description() | {"cpu": cpu_name, "load_before": 0}
        run = {"command": "measure", "date": "2026-01-01"}
        run["machine"] = described_machine | {"commit": "abc", "load_after": 0}
        toy = {"parameters": 1, "active": 1, "figures": [_figure("train", run)]}
        path = tmp_path / f"cpu-{file}-2026-01-01.json"
        path.write_text(json.dumps({"models": {"toy": toy}}))
    text = page.render(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert f"#### {described}\n" in text
    assert "#### another\n" in text


def test_products_fill_the_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(products, "SHAPES", {"odd": (17, 9)})
    monkeypatch.setattr(products, "COLD_BYTES", 2000)
    monkeypatch.setattr(products, "FEW", (1, 5))
    monkeypatch.setattr(products, "MANY", 33)
    monkeypatch.setattr(sys, "argv", ["products", "--repeats", "1", "--out", str(tmp_path)])
    products.main()
    assert "33 rows, back" in capsys.readouterr().out
    text = page.render(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "| GFLOP/s of ours (times the library's) | 1 row | 5 rows | 33 rows |" in text
    assert "| odd, 17 x 9 |" in text


def test_no_ratio_while_the_programs_disagree(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "parity", lambda _: {"logits": 10 * TOLERANCE})
    result = cpu.measure_model("toy", SIZES, repeats=1, llama=None)
    assert result["figures"] == []
    out = capsys.readouterr().out
    assert "NOT COMPARED" in out
    assert "tokens/s" not in out


def test_parity_sees_a_changed_weight(tmp_path):
    pair = build_pair(configs()["toy"], tmp_path)
    assert max(parity(pair, length=24, steps=2).values()) < TOLERANCE
    with torch.no_grad():
        pair.ours.backbone.layers[0].mixer.D.add_(0.1)
    assert max(parity(pair, length=24, steps=2).values()) > TOLERANCE


def test_profile_has_every_part(tmp_path):
    sizes = ["--batch", "1", "--length", "16", "--repeats", "1"]
    profile_layers.main(["--model", "toy", *sizes, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("profile-*.json")
    result = json.loads(path.read_text())
    parts = result["train"]["parts"]
    for part in ("mamba: scan", "routed experts", "latent projections", "attention: projections"):
        assert parts[part]["forward_s"] > 0
        assert parts[part]["backward_s"] > 0
        assert parts[part]["flops"] > 0
    assert parts["optimizer"]["forward_s"] > 0
    assert set(result["decode"]) == {"1", "8"}


def test_parts_add_up_to_the_step(model):
    tokens = tokens_of(model.config, 2, 16)
    step = profiled(model, lambda: our_loss(model, tokens), lambda: None)
    assert step["backward"].keys() <= step["forward"].keys()
    seconds = clocked(model, lambda: model(tokens))
    assert seconds.keys() >= {"embedding", "router", "shared expert", "mamba: gated norm"}


def test_flops_of_the_parts_are_those_of_the_model(model):
    parts = flops_per_token(model, context=64)
    assert sum(parts.values()) == pytest.approx(_products(model.config, 64))


def _products(config, context):
    """FLOPs of the costs, without elementwise work that they also count as two FLOPs."""
    count = 0
    for name, parameter in LanguageModel.from_config(config).named_parameters():
        if (
            "norm" in name
            or "conv1d" in name
            or name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        ):
            count += parameter.numel()
    return forward_flops_per_token(config, context=context) - 2 * count


def test_a_batch_reads_more_experts_but_no_more_than_there_are():
    config = configs()["30m-latent"]
    one, eight, many = (
        limits.decode_bytes(config, batch=batch, context=0) for batch in (1, 8, 4096)
    )
    state = one - 4 * model_costs(config).total_active
    whole = 4 * (model_costs(config).total - model_costs(config).parameters["embedding"])
    assert one < eight < many
    assert many == pytest.approx(whole + 4096 * state, rel=1e-3)


def test_scaling_draws_every_axis(tmp_path):
    axes = {"sequence length": (8, 16), "experts": (4, 8), "experts per token": (1, 2)}
    scaling_arguments = ["--model", "toy", "--tokens", "512", "--repeats", "1"]
    scaling.main([*scaling_arguments, "--out", str(tmp_path)], axes)
    (path,) = tmp_path.glob("scaling-*.json")
    result = json.loads(path.read_text())
    assert [len(points) for points in result["axes"].values()] == [2, 2, 2]
    assert path.with_suffix(".svg").stat().st_size > 1000


def test_peers_take_turns():
    order = []

    def contestant(name, seconds):
        def run():
            order.append(name)
            return seconds

        return run

    samples = interleave({"a": contestant("a", 2.0), "b": contestant("b", 1.0)}, repeats=8)
    rounds = [tuple(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(rounds) == 1 + 8  # the first warms up
    assert set(rounds) == {("a", "b"), ("b", "a")}
    assert samples["a"].median == 2.0
    assert samples["b"].rate(8) == {"median": 8.0, "min": 8.0, "max": 8.0}


def test_the_page_shows_the_committed_results():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text, cpu.RESULTS) == text, "run: python -m benchmarks.page"
    for drawing in sorted(cpu.RESULTS.glob("scaling-*.svg"))[-1:]:
        assert page.DRAWING.read_bytes() == drawing.read_bytes()


def test_a_recorded_command_names_no_place_of_this_machine():
    given = ["--llama-cpp", "/opt/x/bin/llama-bench", "--out", "/tmp/here", "--repeats", "3"]
    recorded = machine.command("benchmarks.cpu", given)
    assert recorded == "python -m benchmarks.cpu --llama-cpp PATH_TO/bin/llama-bench --repeats 3"
    assert machine.command("benchmarks.load", ["runs/tiny/model"]).endswith("load runs/tiny/model")


def test_serving_fills_the_page(tmp_path):
    rate = {"median": 2.0, "min": 1.0, "max": 3.0}
    figure = {"name": "8 clients", "tokens_per_s": {"ours": rate, "llama.cpp": rate}}
    result = {
        "command": "python -m benchmarks.inference",
        "date": "2026-01-01",
        "machine": machine.description() | {"load_before": 0.1, "load_after": 0.2},
        "models": {"one": {"figures": [figure]}, "other": {"figures": []}},
    }
    (tmp_path / "serving-one-2026-01-01.json").write_text(json.dumps(result))
    text = page.render(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "| 8 clients | 2 (1 to 3) | 2 (1 to 3) | 1.00x |" in text
    assert "**other**\n\nNot compared" in text


def test_load_fills_the_page(tmp_path):
    figure = {"whole": 1234, "left_early": 5, "differing": 0, "failed": 0, "tokens_per_s": 99.6}
    figure |= {"first_token_ms": {"median": 1.2, "p95": 20.4}}
    result = {
        "command": "python -m benchmarks.load",
        "date": "2026-01-01",
        "machine": machine.description() | {"load_before": 0.1, "load_after": 0.2},
        "model": "one",
        "clients": {"64": figure},
        "memory_bytes": {"first_third": 10**9, "last_third": 10**9 + 10**6},
        "seconds": 120.0,
    }
    (tmp_path / "load-2026-01-01.json").write_text(json.dumps(result))
    text = page.render(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "| 64 | 100 | 1 ms | 20 ms | 1,234 | 5 | 0 | 0 |" in text
    assert "at most 1,000 MB in the first third of that time and 1,001 MB in the last" in text


def test_sharing_fills_the_page(tmp_path):
    line = {"share": 0.512, "share_min": 0.5, "share_max": 0.6}
    result = {
        "command": "python -m benchmarks.sharing",
        "date": "2026-01-01",
        "machine": machine.description() | {"load_before": 0.1, "load_after": 0.2},
        "lines": {"training beside 1 busy": line},
    }
    (tmp_path / "sharing-amd-epyc-2026-01-01.json").write_text(json.dumps(result))
    text = page.render(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "| training beside 1 busy | 51% | 50% to 60% |" in text


def test_bfloat16_is_measured_beside_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(bfloat16, "configs", lambda: {"tiny": tiny_config()})
    monkeypatch.setattr(bfloat16, "PROMPT", 8)
    monkeypatch.setattr(bfloat16, "DECODED", 2)
    given = ["--models", "tiny", "--repeats", "1", "--threads", str(torch.get_num_threads())]
    bfloat16.main([*given, "--out", str(tmp_path)])
    (file,) = tmp_path.glob("bfloat16-*.json")
    result = json.loads(file.read_text())
    head, *rows = bfloat16.bfloat16_table(result)
    assert [row[0] for row in rows] == ["tiny, train", "tiny, prefill 8", "tiny, decode, batch 1"]
    assert all(len(row) == len(head) for row in rows)
    assert 0 <= result["models"]["tiny"]["divergence"] < 0.1
