"""Put the newest committed results into docs/speed.md.

    python -m benchmarks.page

writes the text between the marks of that page, and its plots. All figures of the page come from
this program; without a result the text says that nothing has been measured.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bfloat16 import bfloat16_table
from benchmarks.cpu import RESULTS
from benchmarks.gpu.record import Results
from benchmarks.gpu.section import Section, all_sections, inference_sections
from benchmarks.gpu.summary import as_markdown
from benchmarks.gpu.tuning import TUNING
from benchmarks.machine import BUSY, limits_in_words
from benchmarks.nano_cpu import nano_table
from benchmarks.products import product_table
from benchmarks.profile_layers import decoding_table, training_table
from benchmarks.rl_peers import peers_in_words, peers_table
from benchmarks.rl_rate import rate_in_words, rate_table
from benchmarks.weights import weights_table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "speed.md"
DRAWING = ROOT / "docs" / "assets" / "scaling.svg"
NOTHING = "Not measured yet.\n"


def render(text: str, results: Path) -> str:
    """The text of the page with every marked block filled from a folder of results."""
    blocks = {
        "cpu": "\n".join(_cpu(path) for path in _newest_of_each(results, "cpu")),
        "profile": "\n".join(
            _profile(path)
            for model in ("30m-latent", "30m-standard", "150m-latent", "150m-standard")
            for path in _newest(results, f"profile-{model}-*.json")
        ),
        "products": "\n".join(_products(path) for path in _newest_of_each(results, "products")),
        "bfloat16": "\n".join(_bfloat16(path) for path in _newest_of_each(results, "bfloat16")),
        "weights": "\n".join(_weights(path) for path in _newest_of_each(results, "weights")),
        "nano_cpu": "\n".join(_nano_cpu(path) for path in _newest_of_each(results, "nano_cpu")),
        "scaling": "\n".join(_scaling(path) for path in _newest(results, "scaling-*.json")),
        "regression": "\n".join(
            _regression(path) for path in _newest_of_each(results, "regression")
        ),
        "serving": "\n".join(_serving(path) for path in _newest_of_each(results, "serving")),
        "load": "\n".join(_load(path) for path in _newest(results, "load-*.json")),
        "sharing": "\n".join(_sharing(path) for path in _newest_of_each(results, "sharing")),
        "rl_peers": "\n".join(_rl_peers(path) for path in _newest_of_each(results, "rl_peers")),
        "rl_rate": "\n".join(_rl_rate(path) for path in _newest_of_each(results, "rl_rate")),
        "gpu": "\n".join(_gpu(path, all_sections()) for path in _newest_of_each(results, "gpu")),
        "inference": "\n".join(
            _gpu(path, inference_sections()) for path in _newest_of_each(results, "inference")
        ),
        "tuning": "\n".join(_gpu(path, [TUNING]) for path in _newest_of_each(results, "tuning")),
    }
    for name, block in blocks.items():
        text = fill(text, name, block or NOTHING)
    return text


def fill(text: str, name: str, block: str) -> str:
    """A page's text with the block between the marks of this name replaced."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    assert marks.search(text), f"the page has no marks for {name}"
    return marks.sub(lambda m: m[1] + block + m[2], text)


def _newest(results: Path, pattern: str) -> list[Path]:
    return sorted(results.glob(pattern))[-1:]


def _newest_of_each(results: Path, kind: str) -> list[Path]:
    """The newest file of each processor, GPU or set of models; names are KIND-SUBJECT-DATE."""
    by_name = {path.stem[:-10]: path for path in sorted(results.glob(f"{kind}-*.json"))}
    return list(by_name.values())


def _gpu(path: Path, sections: Sequence[Section]) -> str:
    results = Results.read(path)
    machine = results.content["machine"]
    origin = (
        f"`{results.content['command']}` at commit {machine['commit']}, "
        f"{results.content['date']}: {machine['gpu']}, {machine['memory_bytes'] / 1e9:.0f} GB, "
        f"PyTorch {machine['torch']}, Triton {machine['triton']}.\n"
    )
    return origin + as_markdown(sections, results)


def _cpu(path: Path) -> str:
    models: dict[str, Any] = json.loads(path.read_text())["models"]
    parts = [part for model in models.values() for part in _parts(model)]
    runs: list[dict[str, Any]] = []
    for part in parts:
        if part["run"] not in runs:
            runs.append(part["run"])
    origins = "".join(f"{number}. {_origin(run)}" for number, run in enumerate(runs, start=1))
    if len(runs) == 1:
        origins = _origin(runs[0])
    else:
        origins = f"Each row says which of these runs it comes from.\n\n{origins}"
    origins = f"#### {runs[0]['machine']['cpu']}\n\n{origins}" if runs else origins
    return origins + "".join(_cpu_model(name, model, runs) for name, model in models.items())


def _regression(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = [
        "| model | row | ratio | 95% interval | commit |\n| --- | --- | ---: | ---: | --- |\n",
        *(
            f"| {f['model']} | {f['row']} | {f['ratio']:.3f} | "
            f"{f['interval'][0]:.3f} to {f['interval'][1]:.3f} | {f['commit']} |\n"
            for f in result["figures"]
        ),
    ]
    machine = result["machine"]
    return (
        f"`python -m benchmarks.regression --against {result['against']}`, {result['date']}: "
        f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}.\n\n"
        + "".join(rows)
    )


def _parts(model: dict[str, Any]) -> list[dict[str, Any]]:
    """All measured figures of a model."""
    return [*model["figures"], *([model["train_memory"]] if "train_memory" in model else [])]


def _cpu_model(name: str, model: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    size = f"{model['parameters'] / 1e6:.1f}M parameters, {model['active'] / 1e6:.1f}M active"
    text = f"\n**{name}** ({size})\n\n"
    if not model["figures"]:
        return text + "Not compared: the programs disagree.\n"
    names = list(dict.fromkeys(n for f in model["figures"] for n in f["tokens_per_s"]))
    peers = [n for n in names if n != "ours"]
    rows = [["", *names, *(f"against {n}" for n in peers), "of the limit"]]
    for figure in model["figures"]:
        rates = figure["tokens_per_s"]
        limit = figure["limit"].partition("_")[0]
        rows.append(
            [
                figure["name"],
                *(_rate(rates[n]) if n in rates else "" for n in names),
                *(f"{figure['ratio'][n]:.2f}x" if n in rates else "" for n in peers),
                f"{figure['share_of_limit']['ours']:.0%} of {limit}",
            ]
        )
    if "train_memory" in model:
        rows.append(_memory_row(model["train_memory"]["bytes"], names, peers))
    if len(runs) > 1:
        ends = ["run", *(str(runs.index(part["run"]) + 1) for part in _parts(model))]
        rows = [[*row, end] for row, end in zip(rows, ends, strict=True)]
    return text + table(rows)


def _memory_row(memory: dict[str, dict[str, int]], names: list[str], peers: list[str]) -> list[str]:
    used = {name: f"{peak['total'] / 1e6:,.0f} MB" for name, peak in memory.items()}
    ratios = {
        name: f"{memory['ours']['total'] / peak['total']:.2f} of it"
        for name, peak in memory.items()
    }
    cells = [*(used.get(name, "") for name in names), *(ratios.get(name, "") for name in peers)]
    return ["train, peak memory", *cells, ""]


def _rate(rate: dict[str, float]) -> str:
    return f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})"


def _profile(path: Path) -> str:
    result = json.loads(path.read_text())
    train = result["train"]
    return (
        _origin(result)
        + f"\n**{result['model']}**, training step, {train['batch']} x {train['length']} tokens\n\n"
        + table(training_table(result))
        + f"\n**{result['model']}**, a decoding step\n\n"
        + table(decoding_table(result))
    )


def _products(path: Path) -> str:
    result = json.loads(path.read_text())
    return f"{_origin(result)}\n{table(product_table(result))}"


def _bfloat16(path: Path) -> str:
    result = json.loads(path.read_text())
    return f"{_origin(result)}\n{table(bfloat16_table(result))}"


def _weights(path: Path) -> str:
    result = json.loads(path.read_text())
    return f"{_origin(result)}\n{table(weights_table(result))}"


def _nano_cpu(path: Path) -> str:
    result = json.loads(path.read_text())
    size = f"{result['parameters'] / 1e9:.1f}B parameters, {result['active'] / 1e9:.1f}B active"
    return f"{_origin(result)}\n**{result['size']}** ({size})\n\n{table(nano_table(result))}"


def _scaling(path: Path) -> str:
    result = json.loads(path.read_text())
    title = f"{result['model']}, {result['tokens']:,} tokens per step"
    return f"{_origin(result)}\n![Training speed: {title}](assets/{DRAWING.name})\n"


def _serving(path: Path) -> str:
    result = json.loads(path.read_text())
    text = _origin(result)
    for name, model in result["models"].items():
        text += f"\n**{name}**\n\n"
        figures = model["figures"]
        if not figures:
            text += "Not compared: the programs write other tokens.\n"
            continue
        names = list(dict.fromkeys(n for figure in figures for n in figure["tokens_per_s"]))
        rows = [["tokens/s", *names, "against the best of the others"]]
        for figure in figures:
            rates = figure["tokens_per_s"]
            others = [rate["median"] for n, rate in rates.items() if not n.startswith("ours")]
            cells = [_rate(rates[n]) if n in rates else "" for n in names]
            ratio = rates["ours"]["median"] / max(others)
            rows.append([figure["name"], *cells, f"{ratio:.2f}x"])
        text += table(rows)
    return text


def _load(path: Path) -> str:
    result = json.loads(path.read_text())
    head = ["clients", "tokens/s", "first token, median", "95% within", "whole", "left early"]
    rows = [[*head, "differing", "lost"]]
    for clients, figure in result["clients"].items():
        first = figure["first_token_ms"]
        times = [f"{first[name]:,.0f} ms" for name in ("median", "p95")]
        counts = [f"{figure[n]:,}" for n in ("whole", "left_early", "differing", "failed")]
        rows.append([clients, f"{figure['tokens_per_s']:,.0f}", *times, *counts])
    early, late = (f"{n / 1e6:,.0f} MB" for n in result["memory_bytes"].values())
    return (
        f"{_origin(result)}\n**{result['model']}**, {result['seconds']:,.0f} seconds with the most "
        f"clients, of which some leave early\n\n{table(rows)}\n"
        f"The server held at most {early} in the first third of that time and {late} in the last.\n"
    )


def _sharing(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = [["", "of its speed alone", "lowest to highest"]]
    for name, line in result["lines"].items():
        spread = f"{line['share_min']:.0%} to {line['share_max']:.0%}"
        rows.append([name, f"{line['share']:.0%}", spread])
    return f"{_origin(result)}\n{table(rows)}"


def _rl_peers(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = f"{table(peers_table(result))}" if result["figures"] else "Not compared.\n"
    return f"{_origin(result)}\n{peers_in_words(result)}\n\n{rows}"


def _rl_rate(path: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    return f"{_origin(result)}\n{rate_in_words(result)}\n\n{table(rate_table(result))}"


def _origin(result: dict[str, Any]) -> str:
    """The command, commit and machine of a result."""
    machine = result["machine"]
    words = (
        f"`{result['command']}` at commit {machine['commit']}, {result['date']}: {machine['cpu']}, "
        f"{machine['threads']} threads of {machine['cores']} cores, PyTorch {machine['torch']}, "
        f"transformers {machine['transformers']}; load average {machine['load_before']} before and "
        f"{machine['load_after']} after."
    )
    if machine["load_before"] > BUSY:
        words += " **The load was high, from others or from a run just before: look at the spans.**"
    if limits := result.get("limits"):
        words += f" Measured limits: {limits_in_words(limits)}."
    return words + "\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first one is the header."""
    head, *rest = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rest))


def main() -> None:
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    for drawing in _newest(RESULTS, "scaling-*.svg"):
        shutil.copy(drawing, DRAWING)
    print(PAGE)


if __name__ == "__main__":
    main()
