"""The GPU program's whole models, at toy size on the CPU: no time is judged here."""

import json
from dataclasses import replace

import pytest
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import whole_models
from benchmarks.gpu.inference import answers
from benchmarks.gpu.record import Record, Results
from benchmarks.gpu.run import run_section
from benchmarks.gpu.section import inference_sections
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.summary import as_markdown, as_text

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from benchmarks import page

SECTIONS = {section.name: section for section in inference_sections()}


@pytest.fixture
def record(tmp_path):
    machine = {"gpu": "Toy", "memory_bytes": 1, "commit": "abc", "torch": "2", "triton": "3"}
    content = {"command": "c", "date": "2026-01-01", "machine": machine, "sections": {}}
    return Record(tmp_path / "inference-toy-2026-01-01.json", content)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n == "parity")) for n in SECTIONS]
)
def test_every_section_runs_and_fills_its_table(name, record):
    section, setting = SECTIONS[name], Setting.toy()
    assert run_section(section, setting, record, seconds=float("inf")) == 0
    written = Results.read(record.path)
    assert list(written.figures(name)) == list(section.parts(setting))
    assert not written.missing()
    rows = section.table(written)
    assert name == "limits" or len(rows) > 1
    assert len({len(row) for row in rows}) <= 1
    assert as_text([section], written)
    text = page.render(page.PAGE.read_text(encoding="utf-8"), record.path.parent)
    assert as_markdown(inference_sections(), written) in text


def test_the_program_runs_them_in_children(tmp_path):
    only = ["--only", "million", "--out", str(tmp_path)]
    assert program.main(["--toy", "--inference", *only]) == 0
    written = json.loads((tmp_path / "toy.json").read_text())
    figures = written["sections"]["million"]
    assert [figures[name]["length"] for name in figures if "read" in name] == [16, 40]
    assert figures["step behind 40"]["context"] == 40


def test_a_stretch_of_a_prompt_goes_on_from_the_last_one(monkeypatch):
    setting = Setting.toy()
    monkeypatch.setattr(whole_models, "CHUNK", 7)
    prompt = whole_models.LongPrompt("nano", 40, setting)
    first, second = prompt.read_to(16), prompt.read_to(40)
    assert (second["start"], second["length"]) == (16, 40)
    model = whole_models.model_of("nano", setting)
    whole = 40 * whole_models.prefill_flops(model.config, length=40)
    assert first["flops"] + second["flops"] == pytest.approx(whole)
    assert prompt._cache.lengths == [40]
    with pytest.raises(AssertionError, match="in order"):
        prompt.read_to(16)


def test_what_does_not_fit_is_left_out_by_name(monkeypatch):
    toy, device = Setting.toy(), replace(Setting.toy(), is_toy=False)
    model = whole_models.model_of("nano", toy)
    monkeypatch.setattr(whole_models, "model_of", lambda *_: model)
    monkeypatch.setattr(whole_models, "free_memory_bytes", lambda _: 4 << 30)
    figure = whole_models.decoding("nano", 1 << 14, 1 << 20, device)
    assert "GB and 1.1 are free" in figure["left_out"]


def timed(seconds, **more):
    return {"step": {"median_s": seconds}} | more


def test_requests_are_put_together_from_prompts_and_steps(record):
    own, other = [
        {
            "prompt": timed(read, length=8192, flops=1.0),
            "short": timed(step, batch=8, context=8192, bytes=1.0),
            "long": timed(3 * step, batch=8, context=24_576, bytes=1.0),
            "alone": timed(step, batch=1, context=8192, bytes=1.0),
        }
        for read, step in ((1.0, 0.01), (2.0, 0.02))
    ]
    rate, batch = whole_models.throughput(own, prompt=8192, answer=16_384)
    assert batch == 8
    assert rate == pytest.approx(8 * 16_384 / (8 * 1.0 + 16_384 * 0.02))
    assert whole_models.throughput({"x": own["alone"]}, prompt=8192, answer=16_384) is None
    record.content["sections"] = {"nano": own, "qwen3-moe": other}
    assert answers.table(record, "nano")[-1][-1] == "-"
    record.put("parity", "steps", {"red": []})
    *_, row = answers.table(record, "nano")
    assert row[-1] == "2.00x of qwen3-moe (paper: 3.3x)"
