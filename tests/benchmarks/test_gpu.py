"""The GPU program's whole path, at toy size in Triton's interpreter: no time is judged here."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import ahead, cases, run, tuning
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.figures import ratio
from benchmarks.gpu.record import DIED, Record, Results
from benchmarks.gpu.run import OUT_OF_TIME, run_section, run_sections
from benchmarks.gpu.section import Section, all_sections
from benchmarks.gpu.sections import kernels, limits, parity
from benchmarks.gpu.setting import Draw, Setting
from benchmarks.gpu.summary import as_markdown, as_text
from benchmarks.gpu.tuning import TUNING

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from benchmarks import page
from nemotron3.ops.norm import api, rms_norm

NAMES = [section.name for section in all_sections()]
TAKES_LONG = {"parity", "tuning"}
TIMED = {"median_s": 2.0}
SCAN = "nemotron3.ops.ssd.triton"


def section_named(name):
    return next(s for s in [*all_sections(), TUNING] if s.name == name)


@pytest.fixture
def record(tmp_path):
    machine = {"gpu": "Toy", "memory_bytes": 1, "commit": "abc", "torch": "2", "triton": "3"}
    content = {"command": "c", "date": "2026-01-01", "machine": machine, "sections": {}}
    return Record(tmp_path / "gpu-toy-2026-01-01.json", content)


def timings(value):
    if isinstance(value, dict):
        for name, part in value.items():
            if name in ("median_s", "min_s", "max_s", "host_s"):
                yield part
            yield from timings(part)
    elif isinstance(value, list):
        for part in value:
            yield from timings(part)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.long, pytest.mark.timeout(900)] * (name in TAKES_LONG)
        )
        for name in [*NAMES, "tuning"]
    ],
)
def test_every_section_runs_and_fills_its_table(name, record):
    section = section_named(name)
    setting = Setting.toy()
    assert run_section(section, setting, record, seconds=float("inf")) == 0
    written = Results.read(record.path)
    assert list(written.figures(name)) == list(section.parts(setting))
    assert not [line for line in written.missing() if "mamba_ssm" not in line]
    assert all(value is None for value in timings(written.content))
    rows = section.table(written)
    if not name.startswith("limits"):
        assert len(rows) > 1
    assert len({len(row) for row in rows}) <= 1
    assert as_text([section], written)
    if name != "tuning":
        text = page.render(page.PAGE.read_text(encoding="utf-8"), record.path.parent)
        assert as_markdown(all_sections(), written) in text


def test_the_program_runs_its_sections_in_children(tmp_path, capfd):
    assert program.main(["--toy", "--only", "limits", "limits-again", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "toy.json").read_text())
    assert list(written["sections"]) == ["limits", "limits-again"]
    assert written["toy"] is True
    assert "clocks: done" in capfd.readouterr().out


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main([]) == 2
    said = capsys.readouterr().err
    assert "no GPU was found" in said
    assert "--toy" in said


def wrong_norm(x, weight, eps):
    return 1.2 * rms_norm(x, weight, eps, backend="reference")


def test_a_wrong_kernel_is_red_and_takes_the_ratios_away(record, monkeypatch):
    setting = Setting.toy()
    right = parity.check([cases.norm(9, 33, torch.float32)], setting)
    record.put("parity", "norm", right)
    assert not right["red"]
    assert ratio(record, {"median_s": 3.0}, TIMED) == "1.50x"
    assert "NOT COMPARED" not in as_text(all_sections(), record)

    monkeypatch.setitem(api._NORMS, "triton", wrong_norm)
    wrong = parity.check([cases.norm(9, 33, torch.float32)], setting)
    record.put("parity", "norm", wrong)
    assert "differs by" in wrong["red"][0]
    assert ratio(record, {"median_s": 3.0}, TIMED) == "-"
    assert "NOT COMPARED, since parity is not green: norm: 9 tokens" in as_text([], record)
    assert "NOT COMPARED" in as_markdown([], record)


def test_a_wrong_kernel_ends_the_program_with_status_1(tmp_path, monkeypatch):
    def children(sections, record, **_):
        for section in sections:
            record.put(section.name, "norm", {"red": ["differs"], "checks": [], "worst": 1.0})

    monkeypatch.setattr(program, "run_sections", children)
    assert program.main(["--toy", "--only", "parity", "--out", str(tmp_path)]) == 1
    assert program.main(["--toy", "--only", "limits", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    "figure", [None, {"error": DIED}, {"left_out": OUT_OF_TIME}, {"red": ["differs"]}]
)
def test_nothing_is_compared_unless_all_of_parity_is_green(record, figure):
    record.put("parity", "scan", {"red": []})
    assert record.may_compare
    if figure is None:
        record.content["sections"] = {}
    else:
        record.put("parity", "norm", figure)
    assert not record.may_compare
    assert ratio(record, TIMED, TIMED) == "-"


def test_a_result_that_moves_between_runs_is_red(monkeypatch):
    calls = []

    def moving(x, weight, eps):
        calls.append(1)
        return rms_norm(x, weight, eps, backend="reference") * (1 + 1e-6 * len(calls))

    monkeypatch.setitem(api._NORMS, "triton", moving)
    figure = parity.check([cases.norm(9, 33, torch.float32)], Setting.toy())
    assert figure["red"] == ["9 tokens of 33, float32: two runs differ, which is a race"]


def test_what_was_never_written_is_seen(monkeypatch):
    def forgetful(x, weight, eps):
        y = torch.empty_like(x)
        y[1:] = rms_norm(x, weight, eps, backend="reference")[1:]
        return y * (weight / weight)

    monkeypatch.setitem(api._NORMS, "triton", forgetful)
    figure = parity.check([cases.norm(9, 33, torch.float32)], Setting.toy())
    assert "differs by inf" in figure["red"][0]
    assert not torch.are_deterministic_algorithms_enabled()


def of_parts(**parts):
    return Section(
        name="some", title="Some", order=0, budget_s=1, parts=lambda _: parts, table=lambda _: []
    )


def fails():
    raise RuntimeError("out of shared memory")


def test_a_part_that_fails_leaves_its_error_and_the_rest_runs(record):
    section = of_parts(first=fails, second=lambda: {"value": 1})
    assert run_section(section, Setting.toy(), record, seconds=float("inf")) == 0
    figures = Results.read(record.path).figures("some")
    assert figures["first"]["error"] == "RuntimeError: out of shared memory"
    assert figures["second"]["value"] == 1
    assert record.missing() == ["some, first: FAILED: RuntimeError: out of shared memory"]


def test_what_is_over_time_is_left_out_by_name(record):
    section = of_parts(first=fails)
    run_section(section, Setting.toy(), record, seconds=-1)
    assert record.missing() == [f"some, first: {OUT_OF_TIME}"]
    record.content["sections"] = {}
    run_sections([section], record, seconds=0.5, is_toy=True)
    assert record.missing() == [f"some, all: {OUT_OF_TIME}"]


def test_after_a_fault_another_process_goes_on(record, monkeypatch):
    """A child records each part before it runs it; the part in which it dies is not tried again."""
    section, lives = of_parts(a=fails, b=fails, c=fails), []

    def child(command, *, timeout, env, **_):
        assert timeout > 0
        assert env["TRITON_INTERPRET"] == "1"
        assert command[command.index("--section") + 1] == "some"
        lives.append(1)
        own = Record.open(record.path)
        part = next((p for p in "abc" if p not in own.figures("some")), None)
        if part is None:
            return subprocess.CompletedProcess(command, 0)
        own.put("some", part, {"error": DIED})
        return subprocess.CompletedProcess(command, -11)

    record.write()
    monkeypatch.setattr(run.subprocess, "run", child)
    run_sections([section], record, seconds=60, is_toy=True)
    assert len(lives) == 4
    assert [line.partition(":")[0] for line in record.missing()] == [
        "some, a",
        "some, b",
        "some, c",
    ]


def test_a_process_that_is_killed_for_time_leaves_a_line_for_the_rest(record, monkeypatch):
    def child(command, *, timeout, **_):
        Record.open(record.path).put("some", "a", {"error": DIED})
        raise subprocess.TimeoutExpired(command, timeout)

    record.write()
    monkeypatch.setattr(run.subprocess, "run", child)
    run_sections([of_parts(a=fails, b=fails)], record, seconds=60, is_toy=True)
    assert record.missing() == [
        f"some, a: FAILED: {DIED}",
        f"some, parts behind it: {OUT_OF_TIME}",
    ]


def test_a_process_that_cannot_start_is_tried_once(record, monkeypatch):
    monkeypatch.setattr(run.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1))
    record.write()
    run_sections([of_parts(a=fails)], record, seconds=60, is_toy=True)
    assert record.missing() == ["some, process: FAILED: it ended with status 1"]


def test_earlier_sections_may_not_take_what_is_kept_for_later_ones(record, monkeypatch):
    given = {}

    def child(section, record, allowed, *_):
        given[section.name] = allowed

    monkeypatch.setattr(run, "_run_in_children", child)
    monkeypatch.setattr(run.time, "monotonic", lambda: 0.0)
    first, second = (replace(of_parts(), name=name, budget_s=40) for name in ("a", "b"))
    run_sections([first, second], record, seconds=100, is_toy=True)
    assert given == {"a": 60, "b": 100}


def test_what_makes_a_run_doubtful_is_said(record):
    record.put("limits", "product", {"product_flops_per_s": 8e14})
    record.put("limits-again", "product", {"product_flops_per_s": 7.5e14})
    assert limits.warnings(record) == []
    record.put("limits-again", "product", {"product_flops_per_s": 5e14})
    clock = {"events_over_host": 0.7, "clocks.sm": "900", "clocks.max.sm": "1980"}
    record.put("limits", "clocks", clock)
    said = limits.warnings(record)
    assert "events and the host's clock differ" in said[0]
    assert "900 of 1980 MHz" in said[1]
    assert "the rate of the product went from 8e+14 to 5e+14" in said[2]


@pytest.fixture
def stand_in(monkeypatch):
    """A CPU that answers as a GPU does: events read the host's clock, and all work is done at once.

    Only the hardware is replaced; what is measured on it is the program's own doing.
    """

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2_000_000_000)
    monkeypatch.setattr("benchmarks.gpu.clock._SWEPT_BYTES", 1 << 10)
    device = torch.device("cpu")
    return replace(Setting.toy(), clock=Clock(device))


def test_the_clock_times_kernels_and_steps(stand_in, monkeypatch):
    # The host's clock advances only while work is done, so the figures are exact.
    passed = 0.0

    def work(seconds):
        nonlocal passed
        passed += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: passed)
    clock = stand_in.clock
    timed = clock.kernel(lambda: work(0.01))
    assert [timed[name] for name in ("min_s", "median_s", "max_s", "host_s")] == pytest.approx(
        [0.01] * 4
    )
    assert timed["repeats"] >= 5
    steps = clock.steps({"a": lambda: work(0.02), "b": lambda: work(0.005)}, repeats=3)
    assert steps["a"]["median_s"] == pytest.approx(0.02)
    assert steps["b"]["median_s"] == pytest.approx(0.005)
    assert clock.agreement(lambda: work(0.05)) == pytest.approx(1)
    assert clock.peak_bytes(lambda: None) == 2_000_000_000


def test_measured_times_become_shares_and_ratios(stand_in, record):
    record.put("parity", "norm", {"red": []})
    record.put("limits", "product", {"product_flops_per_s": 1e10})
    record.put("limits", "copy", {"copy_bytes_per_s": 1e9})
    (small, *_) = (part for name, part in section_named("training").parts(stand_in).items())
    kernel = kernels.measure(cases.norm(64, 64, torch.bfloat16), stand_in)
    record.put("training", "small", small())
    record.put("kernels", "norm", kernel)
    head, row = section_named("kernels").table(record)
    floor = kernel["forward"]["bytes"] / 1e9
    shares = dict(zip(head[1:], row[1:], strict=True))
    assert row[2] == f"{floor / kernel['forward']['triton']['median_s']:.0%}"
    ours, theirs = (kernel["training"][name]["median_s"] for name in ("triton", "torch"))
    assert shares["against PyTorch"] == f"{theirs / ours:.2f}x"
    _, (name, rate, share, *_, memory) = section_named("training").table(record)
    assert name == "small"
    assert int(rate.replace(",", "")) > 0
    assert share.endswith("%")
    assert memory == "2.0 GB"


def test_a_run_on_a_card_is_named_after_it(monkeypatch, tmp_path):
    seen = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=8
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: seen)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: seen.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(program, "compile_ahead", lambda *, capability, **_: capability)
    ran = []
    monkeypatch.setattr(
        program, "run_sections", lambda s, *_, **__: ran.append([x.name for x in s])
    )
    assert program.main(["--out", str(tmp_path), "--commit", "abc"]) == 0
    assert program.main(["--tune", "--out", str(tmp_path)]) == 0
    assert ran == [NAMES, ["limits", "tuning"]]
    (path,) = tmp_path.glob("gpu-nvidia-h100-80gb-hbm3-*.json")
    machine = json.loads(path.read_text())["machine"]
    assert machine["gpu"] == seen.name
    assert machine["commit"] == "abc"
    assert json.loads(path.read_text())["compiled_ahead_s"] == 90
    assert len(list(tmp_path.glob("tuning-nvidia-h100-80gb-hbm3-*.json"))) == 1


def test_bytes_are_those_of_operands_and_results():
    case = cases.norm(4, 8, torch.bfloat16)
    problem = case.draw(Draw(torch.device("cpu"), 0))
    y = [torch.empty(4, 8, dtype=torch.bfloat16)]
    assert cases.forward_bytes(case, problem, y) == 64 + 32 + 64
    assert cases.training_bytes(problem, y) == 3 * (64 + 32) + 2 * 64


@pytest.mark.parametrize("is_tuning", [False, True])
def test_every_case_is_compiled_ahead_once(is_tuning, monkeypatch):
    compiled, settings = [], []

    def compile_case(case):
        compiled.append((case.operation, case.size))
        settings.append(tuning.Knob(module=SCAN, name="_SCAN_BACKWARD", candidates=()).value)
        raise RuntimeError("this one does not compile")

    monkeypatch.setattr(ahead, "compile_case", compile_case)
    monkeypatch.setattr(ahead, "compiling", lambda _: nullcontext())
    for index in range(3):
        ahead.compile_share(index, 3, capability=90, is_tuning=is_tuning)
    setting = replace(Setting.toy(), is_toy=False)
    if is_tuning:
        assert len(compiled) == len(ahead.tuning_jobs(setting))
        assert {"num_warps": 16, "num_stages": 1} in settings
        assert settings[-1] == {"num_warps": 8, "num_stages": 2}
    else:
        wanted = [
            case
            for config in setting.models().values()
            for case in cases.layer_cases(config, setting.tokens, torch.bfloat16)
        ]
        assert {(case.operation, case.size) for case in wanted} <= set(compiled)
        assert len(compiled) == len(ahead.jobs_of_a_run(setting))


def test_compiling_ahead_ends_when_its_time_does(monkeypatch):
    ended = []

    class Slow:
        def __init__(self, command, *, cwd):
            assert (cwd / "Makefile").exists()
            assert command[-3:] == ["--capability", "90", "--tune"]

        def wait(self, timeout):
            raise subprocess.TimeoutExpired("it", timeout)

        def kill(self):
            ended.append(self)

    monkeypatch.setattr(ahead.subprocess, "Popen", Slow)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 4)
    ahead.compile_ahead(capability=90, is_tuning=True, seconds=0.1)
    assert len(ended) == 3


def test_it_needs_few_packages():
    """A GPU machine has PyTorch and little else, and no installed package of ours."""
    script = """
import sys
from importlib.machinery import ModuleSpec
class Absent:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in {names} else None
    def create_module(self, spec):
        raise ModuleNotFoundError(spec.name)
sys.meta_path.insert(0, Absent())
import importlib.metadata as metadata
version = metadata.version
def absent(name):
    assert name != "nemotron3"
    return version(name)
metadata.version = absent
import benchmarks.gpu.__main__
import benchmarks.gpu.setting
"""
    absent = ["pydantic", "tyro", "rich", "matplotlib", "transformers", "beartype", "fastapi"]
    absent += ["hypothesis", "pytest", "tensorboard", "megatron", "pyarrow", "mistral_common"]
    subprocess.run([sys.executable, "-c", script.replace("{names}", repr(set(absent)))], check=True)


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_within_its_shared_memory():
    script = """
from benchmarks.gpu.compiling import SHARED_BYTES, compile_layers
from nemotron3.models.config import ModelConfig
rows = [compiled for _, compiled in compile_layers(ModelConfig.preset("small"))]
assert all(c.shared_bytes <= SHARED_BYTES for c in rows)
assert sum(c.uses_warpgroups for c in rows) > 8
print(*sorted({c.kernel for c in rows}))
"""
    environment = run.environment(is_toy=False)
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment
    )
    for kernel in ("ssd: _scan_backward_kernel", "experts: _weight_gradient_kernel"):
        assert kernel in done.stdout
