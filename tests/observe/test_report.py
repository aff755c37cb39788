import html.parser
import math
import re
from dataclasses import replace

import pytest

from nemotron3.observe.metrics import MetricLog
from nemotron3.observe.report import ReportSummary, TextSample, write_report
from nemotron3.observe.sinks import JsonlSink

pytest.importorskip("matplotlib")

SUMMARY = ReportSummary(
    title="Pre-training: tiny",
    command="nemotron3 pretrain tiny --optimizer.lr 1e-3",
    lead="A model of 4.2 M parameters.",
    facts={"parameters": "4.2 M"},
    baselines={"unigram": 4.61, "gzip -9": 3.02},
    samples=[TextSample(prompt="<b>ROMEO</b>", text='<script>alert("1")</script> & so on')],
    sources=[
        {"source": "Shakespeare", "licence": "CC0-1.0", "bytes": 5_436_475},
        {"source": "Python", "licence": "PSF-2.0", "bytes": 11_221_201},
    ],
    config={"model": {"hidden_size": 128, "limits": [0.0, "inf"]}, "name": "tiny"},
)


def every_metric(step: int) -> dict[str, float]:
    metrics = {
        "train/loss": 9.0 / step,
        "train/loss_mtp_1": 9.5 / step,
        "train/loss_mtp_2": 9.9 / step,
        "train/aux_loss": 1.01,
        "train/mtp_accuracy_1": 0.4,
        "train/mtp_accuracy_2": 0.3,
        "optim/lr": 1e-3,
        "optim/grad_norm": 0.7,
        "moe/max_vio": 0.5,
        "perf/tokens_per_s": 8000.0,
        "perf/flops_per_s": 6e10,
        "perf/peak_fraction": 0.4,
    }
    for layer in (1, 3, 10):
        metrics[f"moe/max_vio_layer_{layer:02d}"] = 1.0 / step
        metrics[f"model/residual_norm_layer_{layer:02d}"] = layer + step / 10
    if step % 5 == 0:
        metrics |= {"eval/bits_per_byte": 2.5, "eval/loss": 4.0}
    return metrics


def report(tmp_path, steps, summary=SUMMARY) -> str:
    with MetricLog([JsonlSink(tmp_path / "metrics.jsonl", next_step=0)]) as log:
        for step, metrics in steps:
            log.log(step, metrics)
    path = write_report(tmp_path, summary=summary)
    assert path == tmp_path / "report.html"
    return path.read_text()


class Checker(html.parser.HTMLParser):
    """Notes tags left open, and everything that a browser would fetch or run."""

    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.open = []
        self.suspicious = []
        self.headings = []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "link", "iframe", "img"):
            self.suspicious.append(tag)
        for name, value in attributes:
            fetches = name in ("src", "href", "xlink:href", "action")
            if name.startswith("on") or (fetches and not value.startswith(("#", "data:image/png"))):
                self.suspicious.append((name, value))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.suspicious == []
    assert "@import" not in page
    return checker


def test_the_whole_report_stands_alone(tmp_path):
    page = report(tmp_path, ((step, every_metric(step)) for step in range(1, 31)))
    headings = checked(page).headings
    assert headings == [
        "Quality",
        "Training loss",
        "Held-out text, bits per byte",
        "Held-out bits per byte while training",
        "Multi-token prediction accuracy",
        "Optimisation",
        "Learning rate",
        "Gradient norm",
        "Inside the model",
        "Expert imbalance by layer (MaxVio)",
        "Expert imbalance, worst layer",
        "Residual stream by layer",
        "Auxiliary balance loss",
        "Speed",
        "Tokens per second",
        "Achieved arithmetic",
        "What it writes",
        "Corpus",
        "Run it again",
    ]
    assert "The median is 40% of this machine&#x27;s peak, 150 GFLOP/s." in page
    assert page.count("<svg") == 12
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_text_of_the_run_is_escaped(tmp_path):
    page = report(tmp_path, [(1, {"train/loss": 1.0})])
    checked(page)
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; so on" in page
    assert "&lt;b&gt;ROMEO&lt;/b&gt;" in page


def test_tables_hold_sources_and_settings(tmp_path):
    page = report(tmp_path, [])
    assert "CC0-1.0" in page
    assert '<td class="number">11,221,201</td>' in page
    assert "<td>model.hidden_size</td><td>128</td>" in page
    assert "nemotron3 pretrain tiny --optimizer.lr 1e-3" in page


@pytest.mark.parametrize(
    "missing", ["train/", "eval/", "optim/", "moe/max_vio_", "model/", "perf/"]
)
def test_missing_series_leave_a_sound_page(tmp_path, missing):
    everything = {step: every_metric(step) for step in range(1, 6)}
    steps = [
        (step, {name: value for name, value in metrics.items() if not name.startswith(missing)})
        for step, metrics in everything.items()
    ]
    assert 5 < report(tmp_path, steps).count("<svg") < 12
    checked((tmp_path / "report.html").read_text())


def test_a_run_without_metrics_has_a_report(tmp_path):
    bare = ReportSummary(title="Nothing yet", command="make run")
    page = write_report(tmp_path, summary=bare).read_text()
    assert checked(page).headings == ["Run it again"]


def test_a_run_that_diverged_has_a_report(tmp_path):
    steps = [(step, dict.fromkeys(every_metric(5), math.nan)) for step in range(1, 4)]
    page = report(tmp_path, [(0, every_metric(5)), *steps])
    checked(page)
    assert "3 values were not finite" in page


def test_writing_again_replaces_the_report(tmp_path):
    report(tmp_path, [(1, {"train/loss": 1.0})])
    page = report(tmp_path, [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5})])
    assert "0.750" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_the_final_figure_goes_before_the_last_look_in_training(tmp_path):
    page = report(tmp_path, [(5, every_metric(5))], replace(SUMMARY, bits_per_byte=2.125))
    assert "2.125" in page
    assert "2.500" not in page
